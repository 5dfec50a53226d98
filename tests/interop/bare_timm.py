"""Import timm with the CPU build of torch, which lacks operators that torchvision registers."""

import sys

import torch

sys.path.insert(0, sys.argv[1])  # the first argument of each peer script is the folder of timm
_operators = torch.library.Library("torchvision", "DEF")
for missing in ("nms", "qnms"):
    _operators.define(f"{missing}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import timm  # noqa: E402

__all__ = ["timm"]
