"""Helpers that run train.py as users do: real processes, real files, a tiny model."""

import contextlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
FAST_COMPILATION = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jax").startswith("0.10."):  # later versions have no such flag
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"

TINY = """
from mae_jax.train import recipes


def get_config():
    config = recipes.base()
    config.batch_size = 8
    config.steps = 24
    config.model.update(image_size=(16, 24), patch=8, width=16, depth=2, heads=2)
    config.model.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.optim.warmup_steps = 4
    config.optim.ema = 0.9
    config.data.update(source="folder", path={folder!r}, workers=0, eval_split="val")
    config.eval.update(knn_every_epochs={every}, pictures_every_epochs={every}, pictures=2)
    config.log.every_steps = 2
    config.checkpoint.every_steps = 5
    return config
"""


def write_tiny(folder, evaluate_every_epochs=3.0):
    """Write a folder of noise in two classes, and a config file that trains on it."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name, low in (("dark", 0), ("light", 128)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    config = folder / "tiny.py"
    config.write_text(TINY.format(folder=str(folder), every=evaluate_every_epochs))
    return config


def command(config, workdir, *overrides, processes=1):
    flags = ["--config", str(config), "--workdir", str(workdir), *overrides]
    launch = [str(ROOT / "scripts" / "launch_local.sh"), str(processes)]
    return [*(launch if processes > 1 else [sys.executable]), str(ROOT / "train.py"), *flags]


def environment(devices=1):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "COLUMNS": "200",
        "PYTHON": sys.executable,
        "PYTHONWARNINGS": "default",
    }


def run(config, workdir, *overrides, code=0, processes=1, devices=1, before=":"):
    """Run to the end and return the output; `before` is a line of shell run first."""
    done = subprocess.run(
        ["bash", "-c", f'{before} && exec "$@"', "bash"]
        + command(config, workdir, *overrides, processes=processes),
        capture_output=True,
        text=True,
        env=environment(devices),
        timeout=900,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(config, workdir, *overrides, processes=1, devices=1, stdout=subprocess.PIPE):
    """Start a run and return its process."""
    return subprocess.Popen(
        command(config, workdir, *overrides, processes=processes),
        stdout=stdout,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(devices),
    )


def children(pid):
    """Return the child processes of all threads of a process."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in lists for child in text.split()]


def processes_of(launcher):
    """Return the processes of a run that a launcher has started, by process index."""
    processes = {}
    for pid in children(launcher.pid):
        with contextlib.suppress(OSError):  # it has just exited
            environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
            processes |= {
                int(x.split("=")[1]): pid for x in environ if x.startswith("JAX_PROCESS_ID=")
            }
    return processes


def wait_for(process, condition, pause=0.01):
    """Wait until the condition holds; fail if the process exits first."""
    deadline = time.monotonic() + 600
    while not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(pause)
            pytest.fail(process.communicate()[0])
        assert time.monotonic() < deadline, "hangs"


def save_first_state(config, workdir):
    """Write the checkpoint of a run before its first step, without training; return its state."""
    from mae_jax.distributed.checkpointer import Checkpointer
    from mae_jax.train.init_state import restore_or_init
    from mae_jax.train.setup import build

    setup = build(config, workdir)
    with Checkpointer(workdir / "checkpoints", 1) as checkpointer:
        state = restore_or_init(config, setup.task, setup.layout, checkpointer, setup.meta)
        checkpointer.save(0, vars(state), setup.meta)
    return state


def final_arrays(workdir, step):
    """Return all arrays of the last checkpoint, read by orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        folder = workdir.absolute() / "checkpoints" / str(step)
        items = {item: reader.restore(folder / item) for item in ("params", "train")}
    return jax.tree.leaves(items)


def assert_same_end(ours, theirs, step=24):
    """Assert that both runs ended with bit-identical parameters and optimizer state."""
    for mine, others in zip(final_arrays(ours, step), final_arrays(theirs, step), strict=True):
        np.testing.assert_array_equal(mine, others)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    """Return the losses by step."""
    return {row["step"]: row["loss"] for row in lines(workdir) if "loss" in row}
