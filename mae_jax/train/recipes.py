"""Recipes: the config files of configs/, which a wheel contains as mae_jax/configs/.

Recipes only set values. A copy of one works from any folder:

    from mae_jax.train import recipes

    def get_config(size: str = "vit_b16"):
        config = recipes.get("finetune", size)
        config.optim.base_lr = 1e-4
        return config
"""

import dataclasses
import runpy
from pathlib import Path

from ml_collections import ConfigDict

import mae_jax
from mae_jax.models.variants import get_variant
from mae_jax.train.config import Config
from mae_jax.train.config_schema import to_config_dict
from mae_jax.utils.errors import UserError


def base() -> ConfigDict:
    """Return the paper's pretraining recipe (appendix A.1) with a ViT-B/16."""
    return to_config_dict(Config())


def set_size(config: ConfigDict, name: str) -> None:
    """Set the shape of the model to one of mae_jax.models.variants."""
    config.update({"model": dataclasses.asdict(get_variant(name))})


def get(name: str, *arguments: str) -> ConfigDict:
    """Return the config of a recipe, as in get("finetune", "vit_b16")."""
    recipe = runpy.run_path(str(_folder() / f"{name}.py"))
    return recipe["get_config"](*arguments)


def names() -> list[str]:
    """Return the names of all recipes, sorted."""
    files = {path.stem for path in _folder().glob("*.py")}
    return sorted(files - {"__init__", "common"})


def find_config(text: str) -> str:
    """Return the value of --config with the path of its file: the user's own, or a recipe.

    Args:
      text: FILE or RECIPE, and optionally a colon and the argument of its get_config.

    Raises:
      UserError: there is neither such a file nor such a recipe.
    """
    file, colon, argument = text.partition(":")
    if not Path(file).is_file():
        if file not in names():
            raise UserError(
                f"--config {text}: {file} is neither a file nor one of the recipes: "
                + ", ".join(names())
            )
        file = str(_folder() / f"{file}.py")
    return f"{file}{colon}{argument}"


def _folder() -> Path:
    """Return mae_jax/configs where a wheel is installed, or configs/ of a checkout."""
    package = Path(mae_jax.__file__).parent
    packaged = package / "configs"
    return packaged if packaged.is_dir() else package.parent / "configs"
