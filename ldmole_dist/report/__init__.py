"""`ldmole report`: route data through a saved adapter and write an HTML page about its routing."""
