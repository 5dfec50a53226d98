"""Training objectives. A task knows its model's loss and draws its own randomness."""
