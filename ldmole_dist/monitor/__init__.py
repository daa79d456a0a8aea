"""Reports of a run: metrics of optimizer steps, evaluations and routing statistics, as JSON lines and in TensorBoard."""
