"""kill -9 at any moment: the same command ends with bit-identical parameters."""

import os
import random
import signal
import time

import pytest
from run_helpers import assert_same_end, children, lines, run, start, wait_for


def finish_as(straight, tiny, workdir):
    run(tiny, workdir)
    assert_same_end(workdir, straight)
    steps = [row["step"] for row in lines(workdir) if "loss" in row]
    assert steps == list(range(2, 25, 2)), "every step occurs once"


def test_at_random_moments(tiny, straight, tmp_path):
    """Three times in one run, at startup, in a step or in a save."""
    for _ in range(3):
        process = start(tiny, tmp_path)
        time.sleep(random.uniform(4, 12))
        process.kill()
        process.communicate()
    finish_as(straight, tiny, tmp_path)


def kill_during_save(process, workdir, step):
    """Send kill -9 while the checkpoint of a step is being written; return whether it was."""
    folder = workdir / "checkpoints"
    wait_for(process, lambda: any(folder.glob(f"{step}.orbax-checkpoint-tmp*")), pause=0)
    os.kill(process.pid, signal.SIGSTOP)
    during = any(folder.glob(f"{step}.orbax-checkpoint-tmp*")) and not (folder / str(step)).exists()
    process.kill()
    process.communicate()
    return during


@pytest.mark.parametrize(("step", "left"), [(5, set()), (15, {"5", "10"})])
def test_during_the_first_and_a_later_save(tiny, straight, tmp_path, step, left):
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        if kill_during_save(start(tiny, workdir), workdir, step):
            break
    else:
        pytest.fail("every save finished before the kill")
    complete = {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()}
    assert complete == left
    finish_as(straight, tiny, workdir)


def test_a_resumed_run_may_read_images_differently(tiny, straight, tmp_path):
    """By worker processes before, and from memory after: the same images, the same crops."""
    process = start(tiny, tmp_path, "--config.data.workers=2", "--config.data.threads=1")
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    process.kill()
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    run(tiny, tmp_path, "--config.data.in_memory=True")
    assert_same_end(tmp_path, straight)


def test_workers_exit_with_a_killed_run(tiny, tmp_path):
    process = start(tiny, tmp_path, "--config.data.workers=2", "--config.steps=100000")
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    started = children(process.pid)
    assert len(started) >= 2
    process.kill()
    process.communicate(timeout=600)  # a surviving worker would hold its output open
    deadline = time.monotonic() + 600
    while any(os.path.exists(f"/proc/{child}") for child in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)
