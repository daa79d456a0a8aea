"""Reports of a run: metrics of each optimizer step and routing statistics, as JSON lines and in TensorBoard."""
