"""Masked autoencoders (He et al., CVPR 2022) in JAX and Flax."""

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str):
    if name == "load":  # imported lazily, so that `import mae_jax` does not import jax
        from mae_jax.convert.pretrained import load

        return load
    raise AttributeError(f"module 'mae_jax' has no attribute {name!r}")
