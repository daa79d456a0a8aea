"""Benchmarks: `ldmole bench`."""
