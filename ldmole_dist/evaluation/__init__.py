"""What a model says of held-out rows: loss, choices, classes, likelihoods, under every ZeRO stage and expert-parallel size."""
