"""What all recipes begin with. Recipes only set values.

The keys are declared in mae_jax/train/config.py, each with its type, default, bounds, unit and
meaning. Any of them can be overridden on the command line, as in --config.optim.base_lr=1e-4.
"""

import dataclasses

from ml_collections import ConfigDict

from mae_jax.models.variants import get_variant
from mae_jax.train.config import Config
from mae_jax.train.config_schema import to_config_dict


def base() -> ConfigDict:
    """Return the paper's pretraining recipe (appendix A.1) with a ViT-B/16."""
    return to_config_dict(Config())


def set_size(config: ConfigDict, name: str) -> None:
    """Set the shape of the model to one of mae_jax.models.variants."""
    config.model.update(dataclasses.asdict(get_variant(name)))
