"""The model of a run: load the backbone, attach the adapter, run forward passes, find saved runs and adapters."""
