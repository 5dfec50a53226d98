"""Warm start: the parameters of a checkpoint of any format in the model of a run."""

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
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.train.config import Config
from mae_jax.utils.pytree import diff, flatten, unflatten
from mae_jax.utils.sides import sides_text

log = logging.getLogger("mae_jax")

HEAD_PARTS = ("head", "head_norm", "attention_pool", "upsample")


@dataclass(frozen=True)
class WarmStart:
    """Parameters of the full model, and the names of its arrays by origin.

    loaded: from the checkpoint; missing: not in the checkpoint, so freshly initialized;
    unexpected: in the checkpoint, but not in the model.
    """

    params: dict[str, Any]
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]


def load_init_weights(
    config: Config,
    task: Pretrain | SupervisedTask,
    arrays: Mapping[str, Any],
    classes: tuple[str, ...],
    path: str | None = None,
) -> WarmStart:
    """Load init.path into a tree of parameters and statistics.

    Args:
      arrays: freshly initialized.
      classes: names of the classes in the data.
      path: where the checkpoint is, if it has been located already.

    Raises:
      ConvertError: the checkpoint cannot be read, or does not fit the model.
    """
    init, model = config.init, config.model
    path = path or str(init.path)
    supervised = isinstance(task, SupervisedTask)
    if init.encoder_only or supervised:
        checkpoint = weights.read(
            path, ema=init.ema, heads=model.heads, require_num_heads=("encoder",)
        )
        checkpoint = weights.encoder_only(checkpoint)
    else:
        heads = dict(heads=model.heads, decoder_heads=model.decoder_heads)
        checkpoint = weights.read(path, ema=init.ema, **heads)
    check_class_tokens(checkpoint.info, model.class_tokens)
    settings: dict[str, Any] = {
        "layer_norm_eps": model.layer_norm_eps,
        "mean": task.mean,
        "std": task.std,
    }
    if isinstance(task, Pretrain):
        settings["target"] = "normalized" if task.norm_pix else "pixels"
    checkpoint = adapt(
        checkpoint,
        image_size=model.image_size,
        channels=model.channels,
        position=model.position,
        final_norm=not supervised or task.model.encoder.final_norm,
    )
    if init.new_head:
        checkpoint = drop_head(checkpoint)
    elif supervised:
        check_head(checkpoint, arrays, task.model.pool, classes)
    warn_mismatched_settings(path, checkpoint.info, settings)
    return merge(arrays, checkpoint)


def check_class_tokens(info: ModelInfo, class_tokens: int) -> None:
    """Raise ConvertError unless a checkpoint has the class tokens of the model of a run."""
    if info.class_tokens != class_tokens:
        raise ConvertError(
            f"it has {info.class_tokens} class tokens, this model {class_tokens}: set "
            f"--config.model.class_tokens={info.class_tokens}"
        )


def adapt(
    checkpoint: Weights,
    *,
    image_size: tuple[int, int],
    channels: int,
    position: str,
    final_norm: bool = True,
) -> Weights:
    """Adapt a checkpoint to the image size, channels and positional embedding of a model.

    Raises:
      ConvertError: the model has fixed sine-cosine positions and the checkpoint other ones; or the
        model needs the encoder's final norm, which fine-tuning with fc_norm removed.
    """
    if checkpoint.info.fc_norm and final_norm:
        raise ConvertError(
            "it was fine-tuned with fc_norm, so it has no final norm, which this model needs: "
            "start from the pretrained checkpoint that it came from, or evaluate it with "
            "mae-jax evaluate"
        )
    if position == "sincos":  # computed, not a parameter
        checkpoint = _without_sincos_tables(checkpoint)
    return weights.adapt(checkpoint, channels=channels, image_size=image_size)


def _without_sincos_tables(checkpoint: Weights) -> Weights:
    arrays = dict(checkpoint.arrays)
    grid = checkpoint.info.grid
    for name in [name for name in arrays if name.endswith("pos_embed/table")]:
        table = arrays.pop(name)[0]
        class_tokens = len(table) - grid[0] * grid[1]
        sincos = sincos_pos_embed_2d(table.shape[1], grid, class_tokens).astype(table.dtype)
        if not np.allclose(table.astype(np.float32), sincos.astype(np.float32), atol=1e-5):
            raise ConvertError(
                f"{name} of the checkpoint is not the sine-cosine table; to keep and train it, set "
                "--config.model.position=learned"
            )
    return dataclasses.replace(checkpoint, arrays=arrays)


def _top_module(name: str) -> str:
    return name.split("/")[0]


def drop_head(checkpoint: Weights) -> Weights:
    """Return the weights without a head."""
    arrays = {n: x for n, x in checkpoint.arrays.items() if _top_module(n) not in HEAD_PARTS}
    return dataclasses.replace(checkpoint, arrays=arrays)


def merge(params: Mapping[str, Any], checkpoint: Weights) -> WarmStart:
    """Replace the arrays of a tree by those of a checkpoint, which must have the full encoder.

    Raises:
      ConvertError: lists every array that the encoder lacks or that has another shape.
    """
    leaves, arrays = flatten(params), checkpoint.arrays
    loaded = [name for name in leaves if name in arrays]
    required = {n: x for n, x in leaves.items() if n in arrays or n.startswith("encoder/")}
    if mismatches := diff(required, {name: arrays[name] for name in loaded}):
        listed = "\n  ".join(mismatches)
        hint = _mismatch_hint(mismatches, checkpoint.info)
        raise ConvertError(f"it does not fit the model of this run:\n  {listed}{hint}")
    merged = leaves | {name: arrays[name].astype(leaves[name].dtype) for name in loaded}
    missing = [name for name in leaves if name not in arrays]
    unexpected = [name for name in arrays if name not in leaves]
    return WarmStart(unflatten(merged), loaded, missing, unexpected)


def _mismatch_hint(mismatches: list[str], info: ModelInfo) -> str:
    """Return the flags with which a checkpoint fits, from lines of `diff`."""
    modules = {_top_module(line.split()[1]) for line in mismatches}
    if "encoder" in modules:
        sizes = {name: vars(info)[name] for name in ("width", "depth", "heads")}
        sizes["patch"] = sides_text(info.patch, ",")
        flags = " ".join(f"--config.model.{name}={value}" for name, value in sizes.items())
        return f"\nThe checkpoint's encoder has {flags}"
    if "decoder" in modules:
        return "\nIf only the decoder differs, --config.init.encoder_only=True ignores it"
    if modules <= {*HEAD_PARTS}:
        return "\n--config.init.new_head=True starts with a new head"
    return ""


def check_head(
    checkpoint: Weights, params: Mapping[str, Any], pool: str, classes: tuple[str, ...]
) -> None:
    """Raise ConvertError if the heads of model and checkpoint differ in kind or problem type.

    Other class names only log a warning.

    Args:
      params: of the model; pool: what its head takes; classes: their names in the data.
    """
    ours, theirs = ({_top_module(name) for name in names} for names in (params, checkpoint.arrays))
    if "head" not in ours or "head" not in theirs:
        return
    kinds = [
        f"{' and '.join(sorted(modules & {*HEAD_PARTS, 'fc_norm'}))} over {pooled}"
        for modules, pooled in ((theirs, checkpoint.info.pool), (ours, pool))
    ]
    if kinds[0] != kinds[1]:
        raise ConvertError(
            f"its head is {kinds[0]}, this model's {kinds[1]}: --config.init.new_head=True starts "
            "with a new head"
        )
    if checkpoint.info.problem_type not in ("", "single_label_classification"):
        raise ConvertError(
            f"its head is for {checkpoint.info.problem_type}, which this model does not train: "
            "--config.init.new_head=True starts with a new head"
        )
    if checkpoint.info.class_names and checkpoint.info.class_names != classes:
        log.warning("the class names of the checkpoint's head differ from the dataset's")


def log_init_report(path: str, warm: WarmStart) -> None:
    """Log which arrays were loaded, missing and unexpected."""
    log.info("warm start from %s: %d arrays loaded", path, len(warm.loaded))
    for what, names in (
        ("loaded", warm.loaded),
        ("missing, freshly initialized", warm.missing),
        ("unexpected, not used", warm.unexpected),
    ):
        if names:
            log.info("  %s: %s", what, ", ".join(names))


def warn_mismatched_settings(path: str, info: ModelInfo, settings: Mapping[str, Any]) -> None:
    """Warn of settings that differ from those that the checkpoint was trained with, by field."""
    for name, value in settings.items():
        before = vars(info)[name]
        if before not in (value, "unknown"):
            log.warning("%s was trained with %s=%s, this run has %s", path, name, before, value)
