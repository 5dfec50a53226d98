"""How long a run is, its learning rate and its optimizer."""

import math
from dataclasses import dataclass

import optax

from mae_jax.tasks.optimizer import adamw, lars, warmup_cosine
from mae_jax.train import Config

OPTIMIZERS = ("adamw", "lars")


@dataclass(frozen=True)
class RunLength:
    """Lengths in optimizer steps; an epoch is as many full batches as the data set has."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: float

    def steps(self, epochs: float) -> int | None:
        """A cadence in epochs as one in steps; None for 0 epochs, which means at the end only."""
        return max(1, round(epochs * self.steps_per_epoch)) if epochs > 0 else None


def make_run_length(config: Config, num_images: int) -> RunLength:
    """The length of a run; ValueError where nothing is left of it, or only its warm-up."""
    per_epoch = max(num_images // config.batch_size, 1)
    total = round(config.epochs * per_epoch) if config.steps is None else config.steps
    key = "warmup_epochs" if config.optim.warmup_steps is None else "warmup_steps"
    warmup = config.optim[key] * (per_epoch if key == "warmup_epochs" else 1)
    evaluates = config.steps == 0 and config.task == "classify"
    if total < 1 and not evaluates:
        raise ValueError(f"the run has {total} steps: set epochs or steps")
    if total > 0 and not 0 <= warmup < total:
        raise ValueError(
            f"optim.{key}={config.optim[key]:g} is a warm-up of {warmup:g} steps, which must be "
            f"shorter than the whole run of {total} steps"
        )
    return RunLength(per_epoch, total, warmup)


def peak_learning_rate(config: Config) -> float:
    """The paper's linear scaling rule (Goyal et al. 2017)."""
    return config.optim.base_lr * config.batch_size / 256


def make_learning_rate(config: Config, duration: RunLength) -> optax.Schedule:
    if duration.total_steps == 0:  # evaluation only
        return optax.constant_schedule(0.0)
    return warmup_cosine(
        peak=peak_learning_rate(config),
        minimum=config.optim.min_lr,
        warmup_steps=duration.warmup_steps,
        total_steps=duration.total_steps,
    )


def _check_optimizer(optim: Config) -> None:
    """ValueError for numbers that would train nothing, or backwards; nan is among them."""
    bounds = {
        "base_lr": (0 <= optim.base_lr < math.inf, "a number from 0 up"),
        "min_lr": (0 <= optim.min_lr < math.inf, "a number from 0 up"),
        "weight_decay": (0 <= optim.weight_decay < math.inf, "a number from 0 up"),
        "b1": (0 <= optim.b1 < 1, "a decay from 0 up to, but not, 1"),
        "b2": (0 <= optim.b2 < 1, "a decay from 0 up to, but not, 1"),
        "momentum": (0 <= optim.momentum < 1, "a decay from 0 up to, but not, 1"),
        "ema": (optim.ema is None or 0 <= optim.ema < 1, "a decay from 0 up to, but not, 1"),
        "eps": (0 < optim.eps < math.inf, "a number above 0"),
        "clip_norm": (optim.clip_norm is None or optim.clip_norm > 0, "a number above 0, or None"),
        "layer_decay": (0 < optim.layer_decay <= 1, "a number above 0, up to 1"),
    }
    for key, (holds, wanted) in bounds.items():
        if not holds:
            raise ValueError(f"optim.{key}={optim[key]} must be {wanted}")
    if optim.name == "lars" and (optim.layer_decay != 1 or optim.clip_norm is not None):
        raise ValueError("optim.layer_decay and optim.clip_norm are adamw's: lars has neither")


def make_optimizer(
    config: Config, learning_rate: optax.Schedule, train_last_blocks: int | None
) -> optax.GradientTransformation:
    """The optimizer; `train_last_blocks` as in Classify. ValueError for what it cannot be."""
    optim = config.optim
    if optim.name not in OPTIMIZERS:
        raise ValueError(f"optim.name={optim.name!r}; use one of {', '.join(OPTIMIZERS)}")
    _check_optimizer(optim)
    without_decay = () if optim.decay_embeddings else ("cls_token", "pos_embed")
    if optim.name == "lars":
        return lars(
            learning_rate,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            without_decay=without_decay,
            train_last_blocks=train_last_blocks,
        )
    return adamw(
        learning_rate,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        without_decay=without_decay,
        clip_norm=optim.clip_norm,
        layer_decay=optim.layer_decay,
        train_last_blocks=train_last_blocks,
    )
