"""What a run logs at its start, and the summary at its end."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from mae_jax.data.sources import Source
from mae_jax.distributed import sharding
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.supervised import SupervisedTask
from mae_jax.train.build_model import RunLength, peak_learning_rate
from mae_jax.train.config import Config
from mae_jax.train.init_state import StateLayout
from mae_jax.utils.console import print_summary_table

log = logging.getLogger("mae_jax.run")


def log_run_summary(
    config: Config,
    task: Pretrain | SupervisedTask,
    layout: StateLayout,
    length: RunLength,
    num_images: int,
    start_step: int,
) -> None:
    """Log the size of the model, of the data and of the run."""
    log.info("parameters: %s", _describe_parameters(task, layout.shapes.params))
    if config.mesh.fsdp > 1:
        split, replicated = sharding.bytes_per_device(layout.shapes, layout.shardings)
        log.info(
            "each device holds %.1f MB of sharded and %.1f MB of replicated parameters and "
            "optimizer state",
            split / 1e6,
            replicated / 1e6,
        )
    log.info(
        "%d images, %d steps of %d (%.1f epochs) from step %d, on %d x %s",
        num_images,
        length.total_steps,
        config.batch_size,
        length.total_steps / length.steps_per_epoch,
        start_step,
        jax.device_count(),
        jax.devices()[0].device_kind,
    )
    if length.total_steps:
        log.info(
            "learning rate %.6g = base_lr %.6g * batch_size %d / 256, after %g steps of warm-up",
            peak_learning_rate(config),
            config.optim.base_lr,
            config.batch_size,
            length.warmup_steps,
        )


def log_knn_off(config: Config, eval_source: Source | None) -> None:
    """Log why k-NN evaluation is off."""
    reason = "there are no labels"
    if eval_source is None:
        reason = f"data.eval_split={config.data.eval_split!r} does not exist"
    log.info("k-NN is off: it needs labels and an evaluation split, and %s", reason)
    if config.eval.rankme:
        log.info("RankMe, which needs neither, is measured at the same intervals")


def _describe_parameters(task: Pretrain | SupervisedTask, shapes: Mapping[str, Any]) -> str:
    sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in shapes.items()}
    text = ", ".join(f"{_count(size)} in {part}" for part, size in sizes.items())
    if isinstance(task, Pretrain):
        text += f"; {task.num_kept} of {task.num_patches} patches are visible"
        if task.num_predicted < task.num_masked:
            text += f"; {task.num_predicted} of {task.num_masked} masked ones are predicted"
    elif task.train_last_blocks is not None:
        blocks = task.train_last_blocks
        text += "; trained: the head" + (f" and the last {blocks} blocks" if blocks else "")
    return text


def _count(size: int) -> str:
    return f"{size / 1e6:.1f} M" if size >= 1e5 else f"{size:,}"


def warn_low_disk_space(workdir: Path, layout: StateLayout, max_to_keep: int) -> None:
    """Warn if the disk has no room for the checkpoints to keep and one more."""
    leaves = jax.tree.leaves(layout.shapes)
    checkpoint = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    present = len(list((workdir / "checkpoints").glob("[0-9]*")))
    required = checkpoint * (max_to_keep + 1 - present)
    free = shutil.disk_usage(workdir).free
    if required > free:
        log.warning(
            "checkpoints will take another %.1f GB, %.1f GB each, and %.1f GB are free in %s: the "
            "run fails at the first that does not fit",
            required / 1e9,
            checkpoint / 1e9,
            free / 1e9,
            workdir,
        )


def read_summary(workdir: Path, step: int) -> dict[str, Any] | None:
    """Return the summary in a workdir if it belongs to that step."""
    try:
        summary = json.loads((workdir / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("steps") == step else None


def print_summary(summary: Mapping[str, Any]) -> None:
    """Print the results of a run as a short table."""
    kinds = {
        "": "this encoder",
        "_random_init": "random encoder",
        "_pixels": "raw pixels",
    }
    names = {"top1": "top-1", "top5": "top-5", "top1_ema": "top-1, EMA parameters"}
    names |= {"miou": "mIoU", "miou_ema": "mIoU, EMA parameters"}
    names |= {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy of classes"}
    names |= {"segment_knn_miou": "mIoU, k-NN of patches"}
    measures = {"knn_top1": "k-NN top-1", "linear_top1": "linear probe top-1", "rankme": "RankMe"}
    of_k = [name for name in summary if re.fullmatch(r"knn_top1_k\d+", name)]
    measures |= {name: f"k-NN top-1, k = {name.removeprefix('knn_top1_k')}" for name in of_k}
    for measure, label in measures.items():
        names |= {f"{measure}{kind}": f"{label}, {text}" for kind, text in kinds.items()}
    names |= {"final_loss": "final loss", "images_per_second": "images per second"}
    rows = {label: summary[name] for name, label in names.items() if summary.get(name) is not None}
    for name, loss in summary.get("yardsticks", {}).items():
        rows[f"yardstick: {name.replace('_', ' ')}"] = loss
    if interval := summary.get("top1_interval"):
        rows["95 % interval of top-1"] = f"{interval[0]:.3f} to {interval[1]:.3f}"
        rows["images evaluated"] = summary["eval_images"]
    if "pictures" in summary:
        rows["pictures"] = summary["pictures"]
    steps = summary["steps"]
    print_summary_table(f"After {steps} steps" if steps else "Without training", rows)
