"""A training run, from its config to its summary."""

from typing import Any

Config = Any  # an ml_collections.ConfigDict, whose keys no type checker knows
