"""Which config changes a resumed run allows."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.train.config import Config
from mae_jax.train.config_schema import declared_keys
from mae_jax.utils.pytree import flatten

log = logging.getLogger("mae_jax.run")

KEYS = declared_keys(Config())


def allowed_keys(config: Config) -> list[str]:
    """Return the keys whose change the user allows."""
    return [key.strip() for key in config.resume.allow.split(",") if key.strip()]


def check_compatible(
    old_meta: Mapping[str, Any],
    new_meta: Mapping[str, Any],
    allow: Sequence[str],
    holder: str = "the workdir",
    key: str = "--workdir",
) -> None:
    """Raise CheckpointError, by key, unless a run may resume a checkpoint.

    Args:
      old_meta, new_meta: metadata of the checkpoint and of the run, with "config" and
        "data_fingerprint".
      allow: keys whose change the user allows.
      holder, key: what holds the checkpoint, and names it.
    """
    old, new = (
        flatten(meta["config"], sep=".") | {"data.fingerprint": meta["data_fingerprint"]}
        for meta in (old_meta, new_meta)
    )
    if unknown := [key for key in allow if key not in {*old, *new}]:
        raise CheckpointError("is not a config key", key="resume.allow", value=unknown[0])
    refused = {}
    for name in sorted({*old, *new}):
        before, after = old.get(name, _declared(name, "implied")), new.get(name)
        if before == after or name == "resume.allow":
            continue
        change = f"{name}: {before} -> {after}"
        if name in allow or _declared(name, "resumable"):
            if key == "--workdir":  # what a mirror holds is checked again there
                log.info("changed since the checkpoint: %s", change)
        else:
            refused[name] = change
    if refused:
        remedy = f", or resume with --config.resume.allow={','.join(refused)}"
        if reshaped := [name for name in refused if _declared(name, "reshapes")]:
            remedy = f": the checkpoint's arrays have other shapes: {', '.join(reshaped)}"
        changes = "\n  ".join(refused.values())
        raise CheckpointError(
            f"{holder} holds a run with another config:\n  {changes}\nUse another {key}{remedy}"
        )


def _declared(key: str, name: str) -> Any:
    """Return what the declaration of a key says; None for keys that are not declared any more."""
    return KEYS[key][name] if key in KEYS else None
