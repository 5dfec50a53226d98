"""What takes minutes: four processes, many kills, processes that stop or hang.

make test-slow
"""

import os
import random
import signal
import time

import numpy as np
import pytest
from run_helpers import (
    assert_same_end,
    lines,
    losses,
    processes_of,
    run,
    start,
    wait_for,
    write_tiny,
)

EACH = "--config.log.every_steps=1"
ROUNDS = 20


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def straight(tiny, tmp_path_factory):
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight")
    run(tiny, workdir, EACH)
    return workdir


@pytest.mark.parametrize("layout", [[], ["--config.mesh.fsdp=4"]], ids=["replicate", "fsdp"])
def test_four_processes_are_one_run(tiny, straight, tmp_path, layout):
    split = ["--config.mesh.min_split_bytes=512", "--config.mesh.max_whole=0.5"]
    run(tiny, tmp_path, EACH, *layout, *split, processes=4)
    ours, theirs = losses(tmp_path), losses(straight)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_killed_twenty_times(tiny, tmp_path):
    """A save after every step, so that most of the kills land in one."""
    flags = [EACH, "--config.checkpoint.every_steps=1", "--config.steps=600"]
    flags += ["--config.eval.knn_every_epochs=-1.0", "--config.eval.pictures_every_epochs=0.0"]
    run(tiny, tmp_path / "straight", *flags)
    workdir, amid = tmp_path / "killed", 0
    for number in range(ROUNDS):
        process = start(tiny, workdir, *flags)
        begun = newest(workdir)
        wait_for(process, lambda begun=begun: newest(workdir) > begun)
        time.sleep(random.uniform(0, 1.0))
        process.kill()
        output = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, f"round {number} was too late: {output}"
        amid += any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    print(f"{ROUNDS} kills, {amid} of them amid a save, the last after step {newest(workdir)}")
    assert amid > 0
    run(tiny, workdir, *flags)
    assert_same_end(workdir, tmp_path / "straight", 600)
    assert [row["step"] for row in lines(workdir) if "loss" in row] == list(range(1, 601))


def newest(workdir):
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def test_a_process_that_stands_still_is_noticed(tiny, tmp_path):
    process = start(tiny, tmp_path, "--config.steps=100000", processes=2)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    stopped = processes_of(process)[1]
    os.kill(stopped, signal.SIGSTOP)
    begin = time.monotonic()
    wait_for(process, lambda: len(processes_of(process)) == 1)
    assert time.monotonic() - begin < 60
    os.kill(stopped, signal.SIGKILL)
    output = process.communicate()[0]
    assert process.returncode not in (0, 2, 3)
    assert "heartbeat" in output


def test_a_process_that_waits_for_ever_says_so(tiny, tmp_path):
    """An image becomes a pipe that nobody writes to: its reader hangs, the other waits for it."""
    images = tiny.parent / "train" / "dark"
    flags = ["--config.steps=100000", "--config.health.hang_minutes=0.5"]
    flags += ["--config.eval.knn_every_epochs=-1.0", "--config.eval.pictures_every_epochs=0.0"]
    process = start(tiny, tmp_path, *flags, processes=2)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    (images / "3.png").rename(images / "3.kept")
    os.mkfifo(images / "3.png")
    try:
        output = process.communicate(timeout=120)[0]
    finally:
        (images / "3.png").unlink()
        (images / "3.kept").rename(images / "3.png")
    assert process.returncode == 1
    assert "has made no progress for 0.5 minutes" in output
    for what in ("waiting for the images of step", "waiting for the devices, which compute"):
        assert f"What it was at: {what}" in output
    assert "sources.py" in "".join(path.read_text() for path in tmp_path.glob("stacks_*.txt"))
