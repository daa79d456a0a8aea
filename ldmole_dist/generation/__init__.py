"""Text out of a saved adapter, in one process."""
