"""Training objectives: each samples the randomness of a batch and computes the loss."""
