"""`ldmole selftest`, which verifies an installation; the tests run the same cases."""
