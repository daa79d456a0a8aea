"""Training: from the config to the trained adapter, the training loop, stop requests and the diagnosis of non-finite losses."""
