"""From files to batches: reading and checking rows, tokenising with loss masks, one global order shared by all ranks."""
