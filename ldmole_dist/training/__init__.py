"""Training: the run from config to adapter, its step loop, stop signals, and the diagnosis of non-finite losses."""
