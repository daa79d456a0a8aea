"""What a configuration costs before anybody runs it: layer benchmark, memory and communication, routing report."""
