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


def check_compatible(
    old_meta: Mapping[str, Any], new_meta: Mapping[str, Any], allow: Sequence[str]
) -> None:
    """Raise CheckpointError, by key, unless a run may resume a checkpoint.

    Args:
      old_meta, new_meta: metadata of the checkpoint and of the run, with "config" and
        "data_fingerprint".
      allow: keys whose change the user allows.
    """
    old, new = (
        flatten(meta["config"], sep=".") | {"data.fingerprint": meta["data_fingerprint"]}
        for meta in (old_meta, new_meta)
    )
    if unknown := [key for key in allow if key not in {*old, *new}]:
        raise CheckpointError("is not a config key", key="resume.allow", value=unknown[0])
    refused = {}
    for key in sorted({*old, *new}):
        before, after = old.get(key, _declared(key, "implied")), new.get(key)
        if before == after or key == "resume.allow":
            continue
        change = f"{key}: {before} -> {after}"
        if key in allow or _declared(key, "resumable"):
            log.info("changed since the checkpoint: %s", change)
        else:
            refused[key] = change
    if refused:
        remedy = f", or resume with --config.resume.allow={','.join(refused)}"
        if reshaped := [key for key in refused if _declared(key, "reshapes")]:
            remedy = f": the checkpoint's arrays have other shapes: {', '.join(reshaped)}"
        changes = "\n  ".join(refused.values())
        raise CheckpointError(
            f"the workdir holds a run with another config:\n  {changes}\n"
            f"Use another --workdir{remedy}"
        )


def _declared(key: str, name: str) -> Any:
    """Return what the declaration of a key says; None for keys that are not declared any more."""
    return KEYS[key][name] if key in KEYS else None
