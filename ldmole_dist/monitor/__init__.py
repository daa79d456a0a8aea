"""What a run says of itself: numbers of each optimizer step, how routing changes, files and TensorBoard."""
