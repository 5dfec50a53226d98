"""kill -9 at any moment: the same command ends as if nothing had happened."""

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
    assert steps == list(range(2, 25, 2)), "no step is missing or there twice"


def test_at_random_moments(tiny, straight, tmp_path):
    """Three times in one run; where it lands is anybody's guess, which is the point."""
    for _ in range(3):
        process = start(tiny, tmp_path)
        time.sleep(random.uniform(4, 12))
        process.kill()
        process.communicate()
    finish_as(straight, tiny, tmp_path)


def kill_amid_save(process, workdir, step):
    """kill -9 while the checkpoint of a step is being written, which is seen to be true."""
    folder = workdir / "checkpoints"
    wait_for(process, lambda: any(folder.glob(f"{step}.orbax-checkpoint-tmp*")), pause=0)
    os.kill(process.pid, signal.SIGSTOP)
    amid = any(folder.glob(f"{step}.orbax-checkpoint-tmp*")) and not (folder / str(step)).exists()
    process.kill()
    process.communicate()
    return amid


@pytest.mark.parametrize(("step", "left"), [(5, set()), (15, {"5", "10"})])
def test_amid_the_first_save_and_a_later_one(tiny, straight, tmp_path, step, left):
    for attempt in range(5):
        workdir = tmp_path / str(attempt)
        if kill_amid_save(start(tiny, workdir), workdir, step):
            break
    else:
        pytest.fail("every save was over before the kill")
    complete = {path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()}
    assert complete == left
    finish_as(straight, tiny, workdir)


def test_everything_about_reading_may_change_when_it_goes_on(tiny, straight, tmp_path):
    """Read by two processes before, and from memory after: the same images, the same crops."""
    process = start(tiny, tmp_path, "--config.data.workers=2", "--config.data.threads=1")
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    process.kill()
    process.communicate()
    assert not (tmp_path / "summary.json").exists()
    run(tiny, tmp_path, "--config.data.in_memory=True")
    assert_same_end(tmp_path, straight)


def test_workers_do_not_outlive_it(tiny, tmp_path):
    process = start(tiny, tmp_path, "--config.data.workers=2", "--config.steps=100000")
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    started = children(process.pid)
    assert len(started) >= 2
    process.kill()
    process.communicate(timeout=30)  # whoever lives on holds its output open
    deadline = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{child}") for child in started):
        assert time.monotonic() < deadline
        time.sleep(0.1)
