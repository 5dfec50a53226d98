"""The official PyTorch layout of MAE weights, by the tables that the converter has for it."""

import jax.numpy as jnp
import numpy as np

from mae_jax.convert.key_maps import LAYOUTS
from mae_jax.convert.state_dict import import_state_dict
from mae_jax.utils.pytree import unflatten

(LAYOUT,) = (o for o in LAYOUTS if o.dialect == "official" and not o.variant)


def our_names(names) -> dict[str, list[str]]:
    """Our parameter name -> the official names it is made of (one per block where stacked)."""
    ours: dict[str, dict[int, str]] = {}
    for name in names:
        parameter, block = LAYOUT.match(name)
        ours.setdefault(parameter, {})[block] = name
    return {name: [theirs[i] for i in sorted(theirs)] for name, theirs in ours.items()}


def to_ours(state_dict: dict[str, np.ndarray], learned_positions: bool) -> dict:
    """Official arrays as our parameter tree; sine-cosine tables are not parameters of ours."""
    depths = {ours: (len(theirs),) for ours, theirs in our_names(state_dict).items()}
    leaves = import_state_dict(LAYOUT, depths, dict(state_dict))
    if not learned_positions:
        leaves = {name: leaf for name, leaf in leaves.items() if "pos_embed" not in name}
    return unflatten({name: jnp.asarray(leaf) for name, leaf in leaves.items()})
