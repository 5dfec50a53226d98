"""What is trained, and which parameters it starts from."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mae_jax.convert import weights
from mae_jax.distributed import sharding
from mae_jax.models import flops
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.classifier import POOLS, Classifier
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import patch_grid
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import POS_EMBEDS, Encoder, check_width
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.train import Config, warm_start
from mae_jax.train.warm_start import WarmStart

TASKS = ("pretrain", "classify")


def make_variant(config: Config) -> VitVariant:
    """Widths, depths and heads; ValueError for those that cannot be."""
    size = VitVariant(
        **{field.name: config.model[field.name] for field in dataclasses.fields(VitVariant)}
    )
    for name, value in (*vars(size).items(), ("channels", config.model.channels)):
        if value < 1:
            raise ValueError(f"model.{name}={value} must be at least 1")
    if not 1 <= config.model.mlp_ratio * min(size.width, size.decoder_width) < math.inf:
        raise ValueError(f"model.mlp_ratio={config.model.mlp_ratio} leaves nothing of an MLP")
    return size


def make_task(
    config: Config,
    mesh: jax.sharding.Mesh,
    classes: tuple[str, ...],
    attend: AttentionImpl = AttentionImpl(),
) -> Pretrain | Classify:
    """The task; `classes` are those of the training data."""
    if config.task not in TASKS:
        raise ValueError(f"task={config.task!r}; use one of {', '.join(TASKS)}")
    model = config.model
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype={model.dtype!r}; use 'float32' or 'bfloat16'")
    if len(model.image_size) != 2:
        raise ValueError(f"model.image_size={tuple(model.image_size)} is not a height and a width")
    mean, std = (tuple(config.data[key])[: model.channels] for key in ("mean", "std"))
    if len(mean) != model.channels or len(std) != model.channels:
        raise ValueError(
            f"data.mean and data.std need a value for each of {model.channels} channels: "
            "python -m mae_jax.data stats computes them"
        )
    if not all(math.isfinite(x) for x in mean) or not all(0 < x < math.inf for x in std):
        raise ValueError(f"data.mean={mean} and data.std={std}: numbers, those of data.std above 0")
    execution = ExecutionConfig(
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        scan_unroll=model.scan_unroll,
        constrain=sharding.batch_constraint(mesh),
        attend=attend,
    )
    if config.task == "classify":
        task = _make_classify(config, execution, mean, std, len(classes))
        _check_cache(config, task)
        return task
    if config.optim.train_last_blocks is not None or config.data.cache_features:
        raise ValueError(
            "optim.train_last_blocks and data.cache_features are for task='classify': pretraining "
            "trains everything"
        )
    return _make_pretrain(config, execution, mean, std)


def _make_pretrain(
    config: Config, execution: ExecutionConfig, mean: tuple[float, ...], std: tuple[float, ...]
) -> Pretrain:
    model, size = config.model, make_variant(config)
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
        predict_ratio=config.decoder.predict_ratio,
        norm_pix=config.target.norm_pix,
        norm_pix_eps=config.target.norm_pix_eps,
    )


def _make_classify(
    config: Config,
    execution: ExecutionConfig,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
) -> Classify:
    model, classify, size = config.model, config.classify, make_variant(config)
    _check_head(config, num_classes)
    check_width("model.width", size.width, size.heads)
    if model.position not in POS_EMBEDS:
        raise ValueError(f"model.position={model.position!r}; use one of {', '.join(POS_EMBEDS)}")
    encoder = Encoder(
        size.width,
        size.depth,
        size.heads,
        patch_grid(tuple(model.image_size), size.patch),
        mlp_ratio=model.mlp_ratio,
        position=model.position,
        layer_norm_eps=model.layer_norm_eps,
        final_norm=not classify.fc_norm,
        drop_path=classify.drop_path,
        execution=execution,
    )
    network = Classifier(
        encoder,
        num_classes=(classify.num_classes or num_classes) if classify.head else 0,
        pool=classify.pool,
        fc_norm=classify.fc_norm,
        head_norm=classify.head_norm,
        head_init_std=classify.head_init_std,
    )
    return Classify(
        model=network,
        patch=size.patch,
        mean=mean,
        std=std,
        train_last_blocks=config.optim.train_last_blocks,
        smoothing=classify.smoothing,
        mixup=Mixup(
            mixup=classify.mixup,
            cutmix=classify.cutmix,
            prob=classify.mixup_prob,
            switch=classify.mixup_switch,
            mode=classify.mixup_mode,
        ),
        erase=classify.erase,
    )


def _check_head(config: Config, num_classes: int) -> None:
    """ValueError for heads that cannot be."""
    classify = config.classify
    if classify.pool not in POOLS:
        raise ValueError(f"classify.pool={classify.pool!r}; use one of {', '.join(POOLS)}")
    if classify.pool == "attention" and classify.fc_norm:
        raise ValueError("classify.pool='attention' takes patches after the final norm: no fc_norm")
    if classify.num_classes is not None and classify.num_classes < num_classes:
        raise ValueError(
            f"classify.num_classes={classify.num_classes} is less than the {num_classes} classes "
            "of the data set: leave it out, and it is as many"
        )
    if not classify.head and config.steps != 0:
        raise ValueError("classify.head=False leaves nothing to train: it needs steps=0")
    if not classify.head and config.eval.knn_every_epochs < 0:
        raise ValueError(
            "classify.head=False with eval.knn_every_epochs below 0 leaves nothing to measure"
        )
    if classify.head_init_std < 0:
        raise ValueError(f"classify.head_init_std={classify.head_init_std} must be at least 0")


def _check_cache(config: Config, task: Classify) -> None:
    """ValueError if features are to be computed once although they would change."""
    fixed = config.data.augment == "none" and task.train_last_blocks == 0 and not task.random
    if config.data.cache_features and not fixed:
        raise ValueError(
            "data.cache_features=True computes the features of each image once: it needs a frozen "
            "encoder (optim.train_last_blocks=0) and images that do not change (data.augment=none, "
            "classify.mixup, cutmix, erase and drop_path 0.0)"
        )


def flops_per_image(config: Config, task: Pretrain | Classify) -> float:
    """Of one training step."""
    size, mlp_ratio = make_variant(config), config.model.mlp_ratio
    values = size.patch**2 * config.model.channels
    if isinstance(task, Pretrain):
        shape = task.num_patches, task.num_kept, values
        return flops.train_flops(size, *shape, mlp_ratio, predicted=task.num_predicted)
    if config.data.cache_features:
        return 0.0
    rows, columns = task.model.encoder.grid
    if task.train_last_blocks == 0:
        return flops.encoder_flops(size, rows * columns, rows * columns, values, mlp_ratio)
    return flops.finetune_flops(size, rows * columns, values, mlp_ratio)


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


def load_init_weights(
    config: Config, task: Pretrain | Classify, arrays: Any, classes: tuple[str, ...]
) -> WarmStart:
    """Fresh arrays, parameters and statistics, with those of init.path in their place."""
    init, model = config.init, config.model
    classifies = isinstance(task, Classify)
    if init.encoder_only or classifies:
        found = weights.read(init.path, ema=init.ema, heads=model.heads, need_heads=("encoder",))
        found = weights.encoder_only(found)
    else:
        heads = dict(heads=model.heads, decoder_heads=model.decoder_heads)
        found = weights.read(init.path, ema=init.ema, **heads)
    now: dict[str, Any] = {
        "layer_norm_eps": model.layer_norm_eps,
        "mean": task.mean,
        "std": task.std,
    }
    if isinstance(task, Pretrain):
        now["target"] = "normalized" if task.norm_pix else "pixels"
    found = warm_start.adapt(
        found,
        image_size=tuple(model.image_size),
        channels=model.channels,
        position=model.position,
        final_norm=not classifies or task.model.encoder.final_norm,
    )
    if init.new_head:
        found = warm_start.drop_head(found)
    elif classifies:
        warm_start.check_head(found, arrays, task.model.pool, classes)
    warm_start.warn_mismatched_settings(init.path, found.info, now)
    return warm_start.merge(arrays, found)
