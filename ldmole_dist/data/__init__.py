"""Data sets: reading and checking rows, tokenization with loss masks, and one global order for all ranks."""
