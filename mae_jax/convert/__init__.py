"""MAE weights in and out: official PyTorch files, HuggingFace, timm and our own runs."""
