"""Text generation with a saved adapter, in one process."""
