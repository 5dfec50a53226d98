"""Conversion and loading of checkpoints: official PyTorch files, Hugging Face, timm, our runs."""
