"""Measurements: benchmarks, the scaling study and the comparison of routers."""
