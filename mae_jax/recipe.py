"""From a config to the parts of a run: one make_* per noun, each checking what it reads."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax import sharding, warm_start
from mae_jax.convert import weights
from mae_jax.data.loader import Loader, ordered_batches
from mae_jax.data.sources import Source, Subset, make_source
from mae_jax.data.transforms import EvalTransform, TrainTransform
from mae_jax.evals.knn import Knn
from mae_jax.evals.reconstruct import STATISTICS
from mae_jax.models.layers import Execution
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_grid
from mae_jax.optim import adamw, warmup_cosine
from mae_jax.sizes import Size
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.warm_start import WarmStart

Config = Any  # an ml_collections.ConfigDict, whose keys no type checker knows


@dataclass(frozen=True)
class Duration:
    """Lengths in optimizer steps; an epoch is as many full batches as the data set has."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: float

    def steps(self, epochs: float) -> int | None:
        """A cadence in epochs as one in steps; None for 0 epochs, which means never."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs > 0 else None


def check_counts(config: Config) -> None:
    """ValueError unless what counts something is at least 1."""
    flat = config.to_dict()
    for group, key in (
        ("log", "every_steps"),
        ("checkpoint", "every_steps"),
        ("checkpoint", "max_to_keep"),
        ("eval", "pictures"),
        ("eval", "batch_size"),
        ("eval", "knn_k"),
        ("eval", "knn_bank"),
        ("eval", "knn_queries"),
    ):
        if flat[group][key] < 1:
            raise ValueError(f"{group}.{key}={flat[group][key]} must be at least 1")
    if config.eval.stats not in STATISTICS:
        raise ValueError(f"eval.stats={config.eval.stats!r}; use one of {', '.join(STATISTICS)}")


def make_size(config: Config) -> Size:
    fields = ("width", "depth", "heads", "patch", "decoder_width", "decoder_depth", "decoder_heads")
    return Size(**{name: config.model[name] for name in fields})


def make_task(config: Config, mesh: jax.sharding.Mesh) -> Pretrain:
    model, size = config.model, make_size(config)
    if config.task != "pretrain":
        raise ValueError(f"task={config.task!r}; use 'pretrain'")
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={model.dtype!r}; use 'float32' or 'bfloat16'")
    if model.channels not in (1, 3):
        raise ValueError(f"model.channels={model.channels}; use 1 (grey) or 3 (RGB)")
    mean, std = (tuple(config.data[key])[: model.channels] for key in ("mean", "std"))
    if len(mean) != model.channels or len(std) != model.channels:
        raise ValueError(
            f"data.mean and data.std need a value for each of {model.channels} channels"
        )
    execution = Execution(
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        scan_unroll=model.scan_unroll,
        constrain=sharding.batch_constraint(mesh),
    )
    grid = patch_grid(tuple(model.image_size), size.patch)
    mae = make_mae(
        size,
        grid=grid,
        channels=model.channels,
        mlp_ratio=model.mlp_ratio,
        position=model.position,
        layer_norm_eps=model.layer_norm_eps,
        execution=execution,
    )
    return Pretrain(
        model=mae,
        grid=grid,
        patch=size.patch,
        mean=mean,
        std=std,
        mask=config.mask.kind,
        mask_ratio=config.mask.ratio,
        user_mask=make_user_mask(config),
        norm_pix=config.target.norm_pix,
        norm_pix_eps=config.target.norm_pix_eps,
    )


def make_user_mask(config: Config) -> np.ndarray | None:
    if config.mask.path is None:
        return None
    try:
        mask = np.load(config.mask.path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"mask.path={config.mask.path!r} cannot be read: {error}") from error
    if not isinstance(mask, np.ndarray):
        raise ValueError(f"mask.path={config.mask.path!r} is an .npz; save one array as .npy")
    return mask


def make_warm_start(config: Config, params: Any) -> WarmStart:
    """Fresh parameters with those of init.path in their place."""
    init, model, data = config.init, config.model, config.data
    if init.encoder_only:
        found = weights.read(init.path, ema=init.ema, heads=model.heads, need_heads=("encoder",))
        found = weights.encoder_only(found)
    else:
        heads = dict(heads=model.heads, decoder_heads=model.decoder_heads)
        found = weights.read(init.path, ema=init.ema, **heads)
    now = {
        "layer_norm_eps": model.layer_norm_eps,
        "target": "normalized" if config.target.norm_pix else "pixels",
        "mean": tuple(data.mean)[: model.channels],
        "std": tuple(data.std)[: model.channels],
    }
    found = warm_start.adapt(
        found,
        image_size=tuple(model.image_size),
        channels=model.channels,
        position=model.position,
    )
    warm_start.warn_of_changes(init.path, found.info, now)
    start = warm_start.graft(params, found)
    warm_start.report(init.path, start)
    return start


def make_train_source(config: Config) -> Source:
    data = config.data
    return make_source(data.source, data.name, data.path, data.train_split)


def make_eval_source(config: Config) -> Source | None:
    """The evaluation split; None for a folder without one."""
    data = config.data
    if data.source == "folder" and not (Path(data.path) / data.eval_split).is_dir():
        return None
    return make_source(data.source, data.name, data.path, data.eval_split)


def make_eval_transform(config: Config) -> EvalTransform:
    return EvalTransform(
        tuple(config.model.image_size), config.model.channels, config.data.eval_crop
    )


def make_knn(config: Config, train_source: Source, eval_source: Source | None) -> Knn | None:
    """The k-NN evaluator; None where there are no labels or no images to evaluate on."""
    if eval_source is None or not train_source.classes or not eval_source.classes:
        return None
    read = partial(
        ordered_batches,
        transform=make_eval_transform(config),
        batch_size=config.eval.batch_size,
        threads=config.data.threads,
        skip=config.data.on_bad == "skip",
    )
    return Knn(
        bank=partial(read, Subset(train_source, config.eval.knn_bank)),
        queries=partial(read, Subset(eval_source, config.eval.knn_queries)),
        k=config.eval.knn_k,
        temperature=config.eval.knn_temperature,
    )


def make_loader(config: Config, source: Source) -> Loader:
    data = config.data
    low, high = data.crop_scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"data.crop_scale={tuple(data.crop_scale)} must rise within 0 to 1")
    if data.on_bad not in ("raise", "skip"):
        raise ValueError(f"data.on_bad={data.on_bad!r}; use 'raise' or 'skip'")
    size, channels = tuple(config.model.image_size), config.model.channels
    return Loader(
        source=source,
        transform=TrainTransform(size, channels, tuple(data.crop_scale), data.flip),
        seed=config.seed,
        batch_size=config.batch_size,
        workers=data.workers,
        threads=data.threads,
        skip=data.on_bad == "skip",
        max_bad=data.max_bad,
    )


def make_duration(config: Config, num_images: int) -> Duration:
    per_epoch = max(num_images // config.batch_size, 1)
    total = round(config.epochs * per_epoch) if config.steps is None else config.steps
    warmup = config.optim.warmup_steps
    warmup = config.optim.warmup_epochs * per_epoch if warmup is None else warmup
    if total < 1:
        raise ValueError(f"the run has {total} steps: set epochs or steps")
    return Duration(per_epoch, total, warmup)


def make_learning_rate(config: Config, duration: Duration) -> optax.Schedule:
    return warmup_cosine(
        peak=config.optim.base_lr * config.batch_size / 256,
        minimum=config.optim.min_lr,
        warmup_steps=duration.warmup_steps,
        total_steps=duration.total_steps,
    )


def make_optimizer(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    optim = config.optim
    return adamw(
        learning_rate,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        clip_norm=optim.clip_norm,
    )
