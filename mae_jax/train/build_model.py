"""Build the objective, the optimizer and the learning rate schedule of a run."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mae_jax.distributed import sharding
from mae_jax.models import flops
from mae_jax.models.attention import AttentionImpl
from mae_jax.models.classifier import Classifier
from mae_jax.models.layers import ExecutionConfig
from mae_jax.models.mae import make_mae
from mae_jax.models.patches import num_patch_values, patch_grid
from mae_jax.models.segmentation import upsample_head_flops
from mae_jax.models.variants import VitVariant
from mae_jax.models.vit import Encoder, make_encoder
from mae_jax.tasks.classify import Classify
from mae_jax.tasks.mixup import Mixup
from mae_jax.tasks.optimizer import adamw, lars, warmup_cosine
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.segment import Segment
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.train.config import Config
from mae_jax.utils.errors import UserError

SEGMENT_INIT_STD = 0.01  # of the first weights of a segmentation head


def make_variant(config: Config) -> VitVariant:
    """Return widths, depths, heads and patch size of the model."""
    model = config.model
    return VitVariant(
        width=model.width,
        depth=model.depth,
        heads=model.heads,
        patch=model.patch,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
        mlp_ratio=model.mlp_ratio,
        class_tokens=model.class_tokens,
    )


def make_task(
    config: Config,
    mesh: jax.sharding.Mesh,
    classes: tuple[str, ...],
    attention: AttentionImpl = AttentionImpl(),
) -> Pretrain | SupervisedTask:
    """Return the objective with its model.

    Args:
      classes: names of the classes in the training data.
      attention: see `attention_selection.select_implementation`.

    Raises:
      UserError: a config value does not fit the model or the data.
    """
    model = config.model
    execution = ExecutionConfig(
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
        scan_unroll=model.scan_unroll,
        shard_activations=sharding.batch_constraint(mesh),
        attention=dataclasses.replace(attention, mesh=mesh),
    )
    if config.task == "classify":
        return _make_classify(config, execution, len(classes))
    if config.task == "segment":
        return _make_segment(config, execution, len(classes))
    return _make_pretrain(config, execution)


def _make_pretrain(config: Config, execution: ExecutionConfig) -> Pretrain:
    model, variant = config.model, make_variant(config)
    grid = patch_grid(model.image_size, variant.patch)
    mae = make_mae(
        variant,
        grid=grid,
        channels=model.channels,
        pos_embed=model.position,
        layer_norm_eps=model.layer_norm_eps,
        drop_path=config.pretrain.drop_path,
        execution=execution,
    )
    mean, std = config.pixel_stats
    return Pretrain(
        model=mae,
        grid=grid,
        patch=variant.patch,
        mean=mean,
        std=std,
        mask=config.mask.kind,
        mask_ratio=config.mask.ratio,
        mask_cell=config.mask.cell,
        user_mask=load_user_mask(config.mask.path),
        predict_ratio=config.decoder.predict_ratio,
        norm_pix=config.target.norm_pix,
        norm_pix_eps=config.target.norm_pix_eps,
        nodata=config.data.nodata is not None,
    )


def _make_classify(config: Config, execution: ExecutionConfig, num_classes: int) -> Classify:
    classify = config.classify
    if classify.num_classes is not None and classify.num_classes < num_classes:
        raise classify.error(
            "num_classes",
            f"is less than the {num_classes} classes of the dataset: leave it out to use these",
        )
    network = Classifier(
        _make_encoder(config, execution, classify.drop_path, final_norm=not classify.fc_norm),
        num_classes=(classify.num_classes or num_classes) if classify.head else 0,
        pool=classify.pool,
        fc_norm=classify.fc_norm,
        head_norm=classify.head_norm,
        head_init_std=classify.head_init_std,
    )
    mean, std = config.pixel_stats
    return Classify(
        model=network,
        patch=config.model.patch,
        mean=mean,
        std=std,
        nodata=config.data.nodata is not None,
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


def _make_encoder(
    config: Config, execution: ExecutionConfig, drop_path: float, *, final_norm: bool = True
) -> Encoder:
    model, variant = config.model, make_variant(config)
    return make_encoder(
        variant,
        patch_grid(model.image_size, variant.patch),
        pos_embed=model.position,
        layer_norm_eps=model.layer_norm_eps,
        final_norm=final_norm,
        drop_path=drop_path,
        execution=execution,
    )


def _make_segment(config: Config, execution: ExecutionConfig, num_names: int) -> Segment:
    segment = config.segment
    if segment.num_classes is None and not num_names:
        raise segment.error(
            "num_classes",
            "must be set, as the classes have no names: or write these to classes.txt next to the "
            "splits, one per line, from class 0 on",
        )
    if segment.num_classes is not None and segment.num_classes < num_names:
        raise segment.error(
            "num_classes",
            f"is less than the {num_names} classes of the dataset: leave it out to use these",
        )
    network = Classifier(
        _make_encoder(config, execution, segment.drop_path),
        num_classes=segment.num_classes or num_names,
        pool="grid",
        head_norm=segment.head_norm,
        head_init_std=SEGMENT_INIT_STD,
        upsample_width=segment.head_width if segment.head == "upsample" else 0,
    )
    mean, std = config.pixel_stats
    return Segment(
        model=network,
        patch=config.model.patch,
        mean=mean,
        std=std,
        nodata=config.data.nodata is not None,
        train_last_blocks=config.optim.train_last_blocks,
        ignore=segment.ignore,
    )


def load_user_mask(path: str | None) -> np.ndarray | None:
    """Load the mask of mask.kind='user'.

    Raises:
      UserError: the file cannot be read as one .npy array.
    """
    if path is None:
        return None
    try:
        mask = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot be read: {error}", key="mask.path", value=path) from error
    if not isinstance(mask, np.ndarray):
        raise UserError("is an .npz; save one array as .npy", key="mask.path", value=path)
    return mask


def flops_per_image(config: Config, task: Pretrain | SupervisedTask) -> float:
    """Return the model FLOPs of one training step per image, as the paper counts them."""
    variant = make_variant(config)
    patch_values = num_patch_values(variant.patch, config.model.channels)
    if isinstance(task, Pretrain):
        return flops.train_flops(
            variant,
            task.num_patches,
            task.num_kept,
            patch_values,
            predicted=task.num_predicted,
        )
    if config.data.cache_features:
        return 0.0
    rows, columns = task.model.encoder.grid
    num_patches, head = rows * columns, 0.0
    if task.model.upsample_width:
        head = 3 * upsample_head_flops((rows, columns), variant.width, task.model.upsample_width)
    if task.train_last_blocks == 0:
        return head + flops.encoder_flops(variant, num_patches, num_patches, patch_values)
    return head + flops.finetune_flops(variant, num_patches, patch_values)


@dataclass(frozen=True)
class RunLength:
    """Lengths in optimizer steps; an epoch has as many full batches as the dataset."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: float

    def steps(self, epochs: float) -> int | None:
        """Convert an interval in epochs to steps; None for 0, which means at the end only."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs > 0 else None


def make_run_length(config: Config, num_images: int) -> RunLength:
    """Return the length of a run.

    Raises:
      UserError: there are no steps, or the warm-up is not shorter than the run.
    """
    optim = config.optim
    per_epoch = max(num_images // config.batch_size, 1)
    total = round(config.epochs * per_epoch) if config.steps is None else config.steps
    name, warmup = "warmup_steps", optim.warmup_steps
    if warmup is None:
        name, warmup = "warmup_epochs", optim.warmup_epochs * per_epoch
    evaluates_only = config.steps == 0 and config.task != "pretrain"
    if total < 1 and not evaluates_only:
        raise UserError(f"the run has {total} steps: set epochs or steps")
    if total > 0 and not 0 <= warmup < total:
        raise optim.error(
            name, f"is a warm-up of {warmup:g} steps, which must be shorter than the run's {total}"
        )
    if (first := config.log.profile_from) is not None and first > total:
        raise config.log.error("profile_from", f"is beyond the {total} steps of the run")
    return RunLength(per_epoch, total, warmup)


def peak_learning_rate(config: Config) -> float:
    """Return the learning rate after warm-up, by linear scaling (Goyal et al. 2017)."""
    return config.optim.base_lr * config.batch_size / 256


def make_learning_rate(config: Config, length: RunLength) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up, then a cosine."""
    if length.total_steps == 0:  # evaluation only
        return optax.constant_schedule(0.0)
    return warmup_cosine(
        peak=peak_learning_rate(config),
        minimum=config.optim.min_lr,
        warmup_steps=length.warmup_steps,
        total_steps=length.total_steps,
    )


def make_optimizer(
    config: Config, learning_rate: optax.Schedule, train_last_blocks: int | None
) -> optax.GradientTransformation:
    """Return the optimizer; `train_last_blocks` as in SupervisedTask."""
    optim = config.optim
    no_weight_decay = () if optim.decay_embeddings else ("cls_token", "pos_embed")
    if optim.name == "lars":
        return lars(
            learning_rate,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            no_weight_decay=no_weight_decay,
            train_last_blocks=train_last_blocks,
        )
    return adamw(
        learning_rate,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        no_weight_decay=no_weight_decay,
        clip_norm=optim.clip_norm,
        layer_decay=optim.layer_decay,
        train_last_blocks=train_last_blocks,
    )
