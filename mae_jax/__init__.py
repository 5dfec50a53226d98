"""Masked autoencoders (He et al., CVPR 2022) in JAX and Flax."""

__version__ = "0.1.0"
