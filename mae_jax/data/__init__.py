"""Where images come from and how they become batches. Nothing here calls into jax."""
