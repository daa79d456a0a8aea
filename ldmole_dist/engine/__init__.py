"""The only package that imports DeepSpeed: process groups, engine, partitioned loading, clipping, optimizer state."""
