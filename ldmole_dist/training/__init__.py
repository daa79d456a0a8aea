"""Training: setup of a run from its config, the training loop, stop requests, and diagnosis of non-finite losses."""
