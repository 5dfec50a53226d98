"""The earlier name of mae_jax.train.recipes, for config files that import it."""

from mae_jax.train.recipes import base, set_size

__all__ = ["base", "set_size"]
