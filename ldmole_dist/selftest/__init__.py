"""What a user runs to accept an installation, and what the tests assert: `ldmole selftest`."""
