"""The LD-MoLE method as in the paper (arXiv 2509.25684): pure torch, no processes, no engine, no model library."""
