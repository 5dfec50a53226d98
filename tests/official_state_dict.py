"""Conversion of official PyTorch state dicts for tests, by the tables of the converter."""

import jax.numpy as jnp
import numpy as np

from mae_jax.convert.key_maps import LAYOUTS
from mae_jax.convert.state_dict import import_state_dict
from mae_jax.utils.pytree import unflatten

(LAYOUT,) = (o for o in LAYOUTS if o.dialect == "official" and not o.variant)


def official_names(names) -> dict[str, list[str]]:
    """Map parameter paths to official names, a list with one per block if stacked."""
    blocks: dict[str, dict[int, str]] = {}
    for name in names:
        path, block = LAYOUT.match(name)
        blocks.setdefault(path, {})[block] = name
    return {path: [official[i] for i in sorted(official)] for path, official in blocks.items()}


def to_params(state_dict: dict[str, np.ndarray], learned_pos_embed: bool) -> dict:
    """Convert official arrays to a parameter tree; fixed position embeddings are dropped."""
    depths = {path: (len(names),) for path, names in official_names(state_dict).items()}
    leaves = import_state_dict(LAYOUT, depths, dict(state_dict))
    if not learned_pos_embed:
        leaves = {name: leaf for name, leaf in leaves.items() if "pos_embed" not in name}
    return unflatten({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
