"""Datasets and the input pipeline. Nothing here imports jax."""
