"""Memory, open files and threads of a long run: `make test-soak`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from run_helpers import start, wait_for, write_tiny

STEPS = int(os.environ.get("SOAK_STEPS", "20000"))
BAD = 3  # an image with values whose squares float32 cannot hold


@pytest.fixture
def images(tmp_path):
    """Arrays of 24 images, one of which makes its step non-finite."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(24, 16, 24, 3)).astype(np.float32)
    np.savez(tmp_path / "val.npz", image=values)
    values[BAD] = rng.uniform(-3e38, 3e38, values[0].shape)
    np.savez(tmp_path / "train.npz", image=values)
    mean = ["--config.data.mean=(0.5,0.5,0.5)", "--config.data.std=(2.0,2.0,2.0)"]
    return ["--config.data.source=arrays", f"--config.data.path={tmp_path}", *mean]


def resources(pid):
    """Return resident memory in MiB, the number of open files and of threads."""
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    memory = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return memory, len(os.listdir(process / "fd")), len(os.listdir(process / "task"))


def last_step(metrics):
    rows = metrics.read_text().splitlines() if metrics.exists() else []
    return json.loads(rows[-1])["step"] if rows else 0


def test_memory_files_and_threads_stay_flat(images, tmp_path):
    workdir = tmp_path / "run"
    log = tmp_path / "log.txt"
    intervals = ["eval.knn_every_epochs=50", "eval.pictures_every_epochs=50"]
    intervals += ["checkpoint.every_steps=50", "log.every_steps=10"]
    flags = [f"--config.{flag}" for flag in (f"steps={STEPS}", *intervals)]
    samples = []
    with open(log, "w") as file:
        process = start(write_tiny(tmp_path / "tiny"), workdir, *images, *flags, stdout=file)
        for step in range(STEPS // 100, STEPS, STEPS // 100):
            wait_for(process, lambda: last_step(workdir / "metrics.jsonl") >= step, pause=0.1)  # noqa: B023
            samples.append(resources(process.pid))
            print(step, *samples[-1], flush=True)
        assert process.wait() == 0, log.read_text()
    second, last = samples[10:20], samples[-10:]
    highest, lowest = np.max(second, axis=0), np.min(last, axis=0)
    print("highest of the second tenth", highest, "and lowest of the last", lowest)
    assert np.max(last, axis=0)[0] <= 1.05 * highest[0], "MiB of resident memory"
    # A background save holds some files and threads, at any sample.
    assert lowest[1] <= highest[1], "open files"
    assert lowest[2] <= highest[2], "threads"
