"""Starting a run on many hosts, watching over its ranks, and looking at the hosts before."""
