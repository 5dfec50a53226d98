"""timm beside the CPU build of torch, for which its torchvision has no operators."""

import sys

import torch

sys.path.insert(0, sys.argv[1])  # the first argument of every peer is the folder of timm
_operators = torch.library.Library("torchvision", "DEF")
for missing in ("nms", "qnms"):
    _operators.define(f"{missing}(Tensor boxes, Tensor scores, float threshold) -> Tensor")

import timm  # noqa: E402

__all__ = ["timm"]
