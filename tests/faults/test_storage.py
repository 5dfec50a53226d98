"""Full disks and corrupt checkpoints."""

import os
import shutil
import subprocess

import pytest
from run_helpers import assert_same_end, command, environment, run, start, wait_for

SMALL = ["--config.model.width=64"]


def steps(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def complete_steps(workdir):
    """Return the steps without those of a failed save, which its threads may still write to."""
    return {name for name in steps(workdir) if "orbax-checkpoint-tmp" not in name}


# Files of at most 300 KiB: a checkpoint's are larger, all others smaller.
LIMIT = "ulimit -f 300"


@pytest.fixture(scope="module")
def roomy(tiny, tmp_path_factory):
    """The result of the runs that run out of space, without a limit."""
    workdir = tmp_path_factory.mktemp("roomy")
    run(tiny, workdir, *SMALL)
    return workdir


def test_a_failed_save_aborts_the_run(tiny, roomy, tmp_path):
    shutil.copytree(roomy / "checkpoints" / "15", tmp_path / "checkpoints" / "15")
    output = run(tiny, tmp_path, *SMALL, code=1, before=LIMIT)
    last = output.splitlines()[-1]
    assert "Traceback" not in output, "all pending writes have failed, too"
    assert f"error: the checkpoint of step 20 could not be written to {tmp_path}/check" in last
    assert "(File too large); the last complete one is of step 15" in last
    assert complete_steps(tmp_path) == {"15"}
    run(tiny, tmp_path, *SMALL)
    assert steps(tmp_path) == {"15", "20", "24"}, "partial checkpoints are removed"
    assert_same_end(tmp_path, roomy)


def test_a_failed_last_save_is_an_error(tiny, tmp_path):
    flags = [*SMALL, "--config.checkpoint.every_steps=1000"]
    output = run(tiny, tmp_path, *flags, code=1, before=LIMIT)
    assert "the checkpoint of step 24 could not be written" in output
    assert "there is none yet" in output
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk(tiny, roomy, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("root cannot mount a small disk here")
    try:
        output = run(tiny, disk / "run", *SMALL, code=1)
        assert "No space left on device" in output.splitlines()[-1]
        assert "GB are free in" in output, "the run warns at its start"
        assert "Free some space or repair the disk: the same command resumes from there" in output
        complete = complete_steps(disk / "run")
        assert complete
        assert all(name.isdecimal() for name in complete)
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        output = run(tiny, disk / "run", *SMALL)
        assert f"resuming from step {max(map(int, complete))}" in output
        assert_same_end(disk / "run", roomy)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def interrupted(tiny, workdir):
    """Kill a run when it has checkpoints of steps 5, 10 and 15."""
    process = start(tiny, workdir)
    wait_for(process, (workdir / "checkpoints" / "15").exists)
    process.kill()
    process.communicate()
    shutil.rmtree(workdir / "checkpoints" / "20", ignore_errors=True)  # it may have gone further
    return workdir / "checkpoints"


def flip_a_bit(folder):
    for file in sorted((folder / "params").rglob("d/*")):
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def test_corrupt_copied_and_empty_steps_are_quarantined(tiny, straight, tmp_path):
    folder = interrupted(tiny, tmp_path)
    flip_a_bit(folder / "15")
    (folder / "40").mkdir()
    shutil.copytree(folder / "15" / "params", folder / "30" / "params")
    output = run(tiny, tmp_path)
    for step in ("15", "30", "40"):
        assert f"checkpoint {folder / step} is damaged and renamed to {step}.damaged" in output
    assert "resuming from step 10" in output
    assert_same_end(tmp_path, straight)
    assert {"15", "20", "24"} <= steps(tmp_path), "saves after the fallback to step 10 exist"


def test_only_corrupt_steps_are_an_error(tiny, tmp_path):
    folder = interrupted(tiny, tmp_path)
    for step in folder.iterdir():
        flip_a_bit(step)
    output = run(tiny, tmp_path, code=2)
    assert "every checkpoint in" in output
    assert "another --workdir" in output


def test_changes_that_would_load_silently_are_an_error(tiny, straight):
    flags = ["--config.model.heads=4", "--config.mask.ratio=0.5", "--config.target.norm_pix=False"]
    output = run(tiny, straight, *flags, code=2)
    for change in ("model.heads: 2 -> 4", "mask.ratio: 0.75 -> 0.5", "target.norm_pix: True -> F"):
        assert change in output


def test_a_second_run_in_one_workdir_is_an_error(tiny, tmp_path):
    first = start(tiny, tmp_path, "--config.steps=100000")
    wait_for(first, (tmp_path / "checkpoints" / "5").exists)
    output = run(tiny, tmp_path, code=2)
    assert f"is in use by process {first.pid} on {os.uname().nodename}" in output
    assert first.poll() is None
    first.kill()
    first.communicate()


def test_an_unwritable_workdir_fails_at_the_start(tiny):
    done = subprocess.run(
        command(tiny, "/proc/mae_jax"), capture_output=True, text=True, env=environment()
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: cannot write to the workdir")
