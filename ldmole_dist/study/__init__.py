"""Benchmarks, the scaling study and the comparison of routers."""
