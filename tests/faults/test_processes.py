"""Runs of two processes, which talk over the loopback."""

import json
import os
import signal
import subprocess

import numpy as np
import pytest
from run_helpers import ROOT, environment, losses, processes_of, run, start, wait_for

from mae_jax.convert import weights

EACH = "--config.log.every_steps=1"  # else a line of metrics may be a mean of fewer steps
SHARDED = [
    EACH,
    "--config.mesh.fsdp=2",
    "--config.mesh.min_split_bytes=512",
    "--config.mesh.max_whole=0.5",
]


def assert_same_losses(ours, theirs):
    ours, theirs = losses(ours), losses(theirs)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


def test_two_processes_train_as_one(tiny, straight, tmp_path):
    output = run(tiny, tmp_path, EACH, processes=2)
    assert output.count("After 24 steps") == 1, "only the main process reports"
    assert output.count("step 24/24") == 1
    assert_same_losses(tmp_path, straight)
    ours, theirs = weights.read(tmp_path), weights.read(straight)
    for name, array in theirs.arrays.items():
        np.testing.assert_allclose(ours.arrays[name], array, atol=1e-4)


def test_two_processes_fine_tune_and_evaluate(tiny, tmp_path):
    """With mixup, stochastic depth, and accuracy over an odd number of images."""
    flags = [EACH, "--config.task=classify", "--config.init.path=random", "--config.steps=9"]
    flags += ["--config.classify.mixup=0.8", "--config.classify.cutmix=1.0"]
    flags += ["--config.classify.erase=0.25", "--config.classify.drop_path=0.2"]
    flags += ["--config.data.eval_split=train", "--config.eval.batch_size=7"]
    flags += ["--config.eval.knn_every_epochs=0.0"]
    summaries = []
    for processes in (1, 2):
        workdir = tmp_path / str(processes)
        run(tiny, workdir, *flags, processes=processes)
        summaries.append(json.loads((workdir / "summary.json").read_text()))
    assert_same_losses(tmp_path / "2", tmp_path / "1")
    alone, together = summaries
    for name in ("top1", "top1_ema", "knn_top1"):
        assert abs(alone[name] - together[name]) < 1.5 / 24, (
            "one image may be on the decision boundary"
        )
    assert alone["eval_images"] == together["eval_images"] == 24


def test_a_sharded_run_is_preempted_and_resumed_on_other_devices(tiny, straight, tmp_path):
    """SIGTERM to one of two stops both; then one process with four devices; then with one."""
    process = start(tiny, tmp_path, *SHARDED, processes=2)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    os.kill(processes_of(process)[1], signal.SIGTERM)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    assert "the same command resumes" in output
    assert "each device holds 0.1 MB of sharded and" in output
    stopped = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"stopped at step {stopped} of 24" in output
    process = start(tiny, tmp_path, *SHARDED, devices=4)
    wait_for(process, (tmp_path / "checkpoints" / f"{stopped // 5 * 5 + 5}").exists)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    run(tiny, tmp_path, EACH)
    assert_same_losses(tmp_path, straight)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other(tiny, straight, tmp_path, victim):
    process = start(tiny, tmp_path, EACH, processes=2)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    os.kill(processes_of(process)[victim], signal.SIGKILL)
    output = process.communicate(timeout=600)[0]  # the default timeout of jax is far longer
    assert process.returncode not in (0, 2, 3)
    assert f"process {victim} of 2 exited with code 137" in output
    assert f"process {1 - victim} of 2 exited with code" in output
    if victim == 0:
        run(tiny, tmp_path, EACH)
        assert_same_losses(tmp_path, straight)


def test_a_corrupt_checkpoint_is_detected_by_all_processes(tiny, straight, tmp_path):
    """Both processes fall back to the step before, also if only one of them fails to read."""
    process = start(tiny, tmp_path, *SHARDED, processes=2)
    wait_for(process, (tmp_path / "checkpoints" / "15").exists)
    for pid in processes_of(process).values():
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=600)
    newest = max(
        (tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name.split(".")[0])
    )
    for file in newest.joinpath("train").rglob("ocdbt.process_1/d/*"):
        file.write_bytes(file.read_bytes()[:20])
    output = run(tiny, tmp_path, *SHARDED, processes=2)
    assert f"{newest} is damaged and renamed" in output
    assert_same_losses(tmp_path, straight)


def test_processes_of_different_runs_are_an_error(tiny, tmp_path):
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, sys\n"
        "number = os.environ['JAX_PROCESS_ID']\n"
        "sys.argv[-1] += number\n"
        f"sys.argv[0] = {str(tmp_path)!r}\n"
        "os.execv(sys.executable, [sys.executable, 'train.py', *sys.argv[1:]])\n"
    )
    for flag, what in (("--config.seed=", "config"), ("--workdir=" + str(tmp_path), "workdir")):
        flags = ["--config", str(tiny), "--workdir", str(tmp_path / "w"), flag]
        command = [str(ROOT / "scripts" / "launch_local.sh"), "2", str(script), *flags]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(), cwd=ROOT, timeout=600
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("error: process 1 has another " + what) == 1
        assert "process 1 of 2 exited with code 2" in done.stderr
