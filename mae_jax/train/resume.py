"""Which config changes a resumed run allows."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.utils.pytree import flatten

log = logging.getLogger("mae_jax.run")

# Keys (or prefixes, ending in ".") that may differ on resume: they change how the computation is
# sharded, logged and stored, but not its result.
RESUMABLE_KEYS = (
    "init.",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "data.path",
    "data.workers",
    "data.threads",
    "data.resize_on",
    "data.canvas",
    "data.in_memory",
    "data.on_bad",
    "data.max_bad",
    "eval.",
    "log.",
    "health.",
    "checkpoint.",
    "resume.",
    "mesh.",
)
# Keys whose change alters the shapes of arrays, which no checkpoint can fill.
SHAPE_KEYS = (
    "model.width",
    "model.depth",
    "model.patch",
    "model.channels",
    "model.mlp_ratio",
    "model.decoder_width",
    "model.decoder_depth",
)
# Keys that checkpoints of earlier versions lack, with the values that these implied.
DEFAULTS_OF_NEW_KEYS = {"decoder.predict_ratio": 1.0}


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
        before, after = old.get(key, DEFAULTS_OF_NEW_KEYS.get(key)), new.get(key)
        if before == after or key == "resume.allow":
            continue
        change = f"{key}: {before} -> {after}"
        if key in allow or _is_resumable(key):
            log.info("changed since the checkpoint: %s", change)
        else:
            refused[key] = change
    if refused:
        remedy = f", or resume with --config.resume.allow={','.join(refused)}"
        if reshaped := [key for key in refused if key in SHAPE_KEYS]:
            remedy = f": its arrays have other shapes, because of {', '.join(reshaped)}"
        changes = "\n  ".join(refused.values())
        raise CheckpointError(
            f"the workdir holds a run with another config:\n  {changes}\n"
            f"Use another --workdir{remedy}"
        )


def _is_resumable(key: str) -> bool:
    return any(key == k or (k.endswith(".") and key.startswith(k)) for k in RESUMABLE_KEYS)
