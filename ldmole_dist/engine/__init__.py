"""The only room that imports deepspeed: start-up, expert groups and marks, partitioned loading, masters, clipping."""
