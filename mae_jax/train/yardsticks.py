"""Yardsticks of a pretraining run: measured at its start, compared with its loss once."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mae_jax.distributed import processes
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.yardsticks import DESCRIPTIONS, yardstick_losses
from mae_jax.train.build_data import make_train_transform
from mae_jax.train.init_state import split_rng
from mae_jax.train.progress import MetricsLogger
from mae_jax.train.setup import RunSetup
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax.run")

FILE = "yardsticks.json"  # in the workdir
MAX_IMAGES = 256
MAX_VALUES = 64 * 224 * 224 * 3  # of all images, so that large ones take seconds, too
CHUNK = 8  # images at a time


@dataclass
class LossCheck:
    """Warns once if a run's loss beats no yardstick; without yardsticks it does nothing.

    Args:
      values: losses by name, as in DESCRIPTIONS.
      to_beat: the mean loss of some steps must be below it.
      first, last: these steps are after `first`, up to `last`.
      path: where to note that the warning was given.
    """

    values: dict[str, float]
    to_beat: float
    first: int
    last: int
    path: Path
    warned_at: int | None = None
    _losses: dict[int, float] = field(default_factory=dict)

    def step_done(self, step: int, metrics: Mapping[str, float]) -> None:
        """Handle the metrics of a finished step; a step may come again after a rollback."""
        if not self.values or self.warned_at is not None or not self.first < step <= self.last:
            return
        if not metrics.get("skipped"):
            self._losses[step] = metrics["loss"]
        loss = float(np.mean(list(self._losses.values()))) if self._losses else math.nan
        if step == self.last and loss >= self.to_beat:
            self.warned_at = step
            self.save()
            log.warning(
                "after warm-up and an epoch the loss, %.3f up to step %d, beats no yardstick up to "
                "%.3f: %s. The model has learned nothing yet: check optim.base_lr, data.mean, "
                "data.std and the images (docs/evaluation.md)",
                loss,
                step,
                self.to_beat,
                describe(self.values),
            )

    def save(self) -> None:
        """Write the yardsticks, and the step of the warning, for the time after a restart."""
        write_json(self.path, {"losses": self.values, "warned_at": self.warned_at})

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says about the yardsticks."""
        return {"yardsticks": self.values} if self.values else {}


def make_loss_check(setup: RunSetup, logger: MetricsLogger, start_step: int) -> LossCheck:
    """Measure the yardsticks of a pretraining run, or read those of its earlier start.

    They are measured, logged and written by the main process. All processes must call this
    together.

    Raises:
      UserError: an image is bad, as in training.
    """
    length, path = setup.length, setup.workdir / FILE
    first = max(math.ceil(length.warmup_steps), length.steps_per_epoch)
    last = min(first + setup.config.log.every_steps, length.total_steps)
    check = LossCheck({}, math.inf, first, last, path)
    if not isinstance(setup.task, Pretrain):
        return check
    with processes.raise_together():
        if processes.is_main():
            check.values, check.warned_at = _read(path)
            if not check.values:
                logger.heartbeat("measuring the yardsticks")
                check.values = _measure(setup, setup.task)
                if check.values:
                    scalars = {f"yardstick_{name}": loss for name, loss in check.values.items()}
                    logger.writer.write_scalars(start_step, scalars)
                    check.save()
            check.to_beat = _loss_to_beat(check.values, norm_pix=setup.task.norm_pix)
    return check


def _loss_to_beat(losses: Mapping[str, float], *, norm_pix: bool) -> float:
    """Return the largest of the yardsticks; with norm_pix not more than that of zeros."""
    if not losses:
        return math.inf
    # A prediction of zeros needs no image: no model should be worse.
    return min(max(losses.values()), losses["patch_mean"] if norm_pix else math.inf)


def _read(path: Path) -> tuple[dict[str, float], int | None]:
    """Return the yardsticks in a workdir and the step of their warning; {} if there are none."""
    try:
        written = json.loads(path.read_text())
        return {name: float(written["losses"][name]) for name in DESCRIPTIONS}, written["warned_at"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}, None


def _measure(setup: RunSetup, task: Pretrain) -> dict[str, float]:
    """Measure the yardsticks on the first images of the run, with the masks of its first step.

    Returns:
      Losses by name; {} if they are NaN/Inf.
    """
    config = setup.config
    assert setup.loader is not None
    size = math.prod(config.model.image_size) * config.model.channels
    wanted = min(MAX_IMAGES, max(MAX_VALUES // size, CHUNK), len(setup.train_source))
    chunk = min(CHUNK, wanted)
    loader = dataclasses.replace(
        setup.loader,
        transform=make_train_transform(config, np.dtype(setup.pixel_dtype)),
        shapes={},
        batch_size=chunk,
        workers=0,
        host=0,
        hosts=1,
    )
    count = wanted // chunk * chunk
    key = jax.random.fold_in(split_rng(config.seed)[1], 0)
    mask = jax.jit(task.sample_mask, static_argnums=1)(key, count)
    with closing(loader.batches(0)) as batches:
        images = (batch["image"] for batch in islice(batches, count // chunk))
        losses = yardstick_losses(task, images, mask)
    if not np.isfinite(list(losses.values())).all():
        log.warning("there are no yardsticks: some of the first %d images have NaN/Inf", count)
        return {}
    log.info(
        "yardsticks, losses without a network on %d training images: %s. A model that has learned "
        "something is below them",
        count,
        describe(losses),
    )
    return losses


def describe(losses: Mapping[str, float]) -> str:
    """Return yardsticks in words."""
    return ", ".join(f"{losses[name]:.3f} for {text}" for name, text in DESCRIPTIONS.items())
