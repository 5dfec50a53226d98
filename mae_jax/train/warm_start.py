"""Parameters for a run from a checkpoint of any dialect, and what became of each array."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mae_jax.convert import weights
from mae_jax.convert.model_info import ConvertError, ModelInfo
from mae_jax.convert.weights import Weights
from mae_jax.models.patches import sincos_pos_embed_2d
from mae_jax.utils.pytree import diff, flatten, unflatten

log = logging.getLogger("mae_jax")


@dataclass(frozen=True)
class WarmStart:
    """params: of the whole model. The lists hold names of arrays.

    loaded: taken from the checkpoint; fresh: as they were initialised; unused: the checkpoint has
    them, the model does not.
    """

    params: dict[str, Any]
    loaded: list[str]
    fresh: list[str]
    unused: list[str]


def adapt(
    found: Weights,
    *,
    image_size: tuple[int, int],
    channels: int,
    position: str,
    final_norm: bool = True,
) -> Weights:
    """The checkpoint for the model of a run: of its image size, channels and kind of positions.

    Raises:
      ConvertError: sine-cosine positions are wanted and the checkpoint's are others; or the model
        needs the encoder's final norm and the checkpoint has lost it in fine-tuning.
    """
    if found.info.fc_norm and final_norm:
        raise ConvertError(
            "it is fine-tuned with fc_norm, and so has no final norm, which this model needs: "
            "start from the pretrained checkpoint that it came from, or evaluate it as it is with "
            "python -m mae_jax.evaluate"
        )
    if position == "sincos":  # computed, not a parameter
        found = _without_tables(found)
    return weights.adapt(found, channels=channels, image_size=image_size)


def _without_tables(found: Weights) -> Weights:
    arrays = dict(found.arrays)
    for name in [name for name in arrays if name.endswith("pos_embed/table")]:
        table = arrays.pop(name)[0]
        sincos = sincos_pos_embed_2d(table.shape[1], found.info.grid).astype(table.dtype)
        if not np.allclose(table.astype(np.float32), sincos.astype(np.float32), atol=1e-5):
            raise ConvertError(
                f"{name} of the checkpoint is not the sine-cosine table; to keep it, train it on "
                "with --config.model.position=learned"
            )
    return dataclasses.replace(found, arrays=arrays)


HEAD_PARTS = ("head", "head_norm", "attention_pool")


def _part(name: str) -> str:
    return name.split("/")[0]


def drop_head(found: Weights) -> Weights:
    """The same weights without a classification head."""
    arrays = {name: x for name, x in found.arrays.items() if _part(name) not in HEAD_PARTS}
    return dataclasses.replace(found, arrays=arrays)


def merge(params: Mapping[str, Any], found: Weights) -> WarmStart:
    """A tree of fresh arrays with the checkpoint's in their place; its encoder must be whole.

    Raises:
      ConvertError: lists every array that is missing from the encoder or of another shape.
    """
    leaves = flatten(params)
    loaded = [name for name in leaves if name in found.arrays]
    fresh = [name for name in leaves if name not in found.arrays]
    unused = [name for name in found.arrays if name not in leaves]
    needed = {
        name: x for name, x in leaves.items() if name in loaded or name.startswith("encoder/")
    }
    wrong = diff(needed, {name: found.arrays[name] for name in loaded})
    if wrong:
        advice = ""
        if any(" encoder/" in line for line in wrong):
            model = {name: vars(found.info)[name] for name in ("width", "depth", "heads", "patch")}
            flags = " ".join(f"--config.model.{name}={value}" for name, value in model.items())
            advice = f"\nThe encoder of the checkpoint is that of {flags}"
        elif any(" decoder/" in line for line in wrong):
            advice = (
                "\nIf only the decoder is another, --config.init.encoder_only=True leaves it out"
            )
        if all(_part(line.split()[1]) in HEAD_PARTS for line in wrong):
            advice = "\n--config.init.new_head=True begins with a new head"
        listed = "\n  ".join(wrong)
        raise ConvertError(f"it does not fit the model of this run:\n  {listed}{advice}")
    merged = leaves | {name: found.arrays[name].astype(leaves[name].dtype) for name in loaded}
    return WarmStart(unflatten(merged), loaded, fresh, unused)


def check_head(
    found: Weights, params: Mapping[str, Any], pool: str, classes: tuple[str, ...]
) -> None:
    """ConvertError if model and checkpoint have heads of different kinds; warns of other classes.

    Args:
      params: of the model; pool: what its head takes; classes: what they are called in the data.
    """
    ours, theirs = ({_part(name) for name in names} for names in (params, found.arrays))
    if "head" not in ours or "head" not in theirs:
        return
    kinds = [
        f"{' and '.join(sorted(parts & {*HEAD_PARTS, 'fc_norm'}))} over {pooled}"
        for parts, pooled in ((theirs, found.info.pool), (ours, pool))
    ]
    if kinds[0] != kinds[1]:
        raise ConvertError(
            f"its head is {kinds[0]}, this model's {kinds[1]}: --config.init.new_head=True begins "
            "with a new head"
        )
    names = found.info.class_names
    if names and names != classes:
        log.warning("the head of the checkpoint names its classes otherwise than the data set does")


def log_init_report(path: str, start: WarmStart) -> None:
    """Logs what became of every array."""
    log.info("warm start from %s: %d arrays loaded", path, len(start.loaded))
    for what, names in (
        ("loaded", start.loaded),
        ("initialised anew", start.fresh),
        ("not used", start.unused),
    ):
        if names:
            log.info("  %s: %s", what, ", ".join(names))


def warn_mismatched_settings(path: str, info: ModelInfo, now: Mapping[str, Any]) -> None:
    """Warns of what was otherwise when the checkpoint was trained than it is `now`, by field."""
    for name, value in now.items():
        before = vars(info)[name]
        if before not in (value, "unknown"):
            log.warning("%s was trained with %s=%s, this run has %s", path, name, before, value)
