"""Launch of a job on one or many hosts, supervision of its ranks, and checks of the hosts before the start."""
