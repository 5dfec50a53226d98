"""From a config to the parts of a run: one make_* per noun, each checking what it reads."""

from typing import Any

Config = Any  # an ml_collections.ConfigDict, whose keys no type checker knows
