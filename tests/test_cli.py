"""train.py as its users run it: real processes, real files."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from run_helpers import (
    ROOT,
    assert_same_end,
    command,
    environment,
    lines,
    run,
    start,
    wait_for,
    write_tiny,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(tiny, workdir)


def test_a_run_writes_its_results(finished):
    workdir, output = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == 24
    assert 0 <= summary["knn_top1"] <= 1
    assert np.isfinite(summary["final_loss"])
    assert summary["images_per_second"] > 0
    assert json.loads((workdir / "config.json").read_text())["optim"]["ema"] == 0.9
    assert {path.name for path in (workdir / "pictures").iterdir()} == {
        "step_0000009.png",
        "step_0000018.png",
        "step_0000024.png",
    }
    losses = [row["step"] for row in lines(workdir) if "loss" in row]
    assert losses == list(range(2, 25, 2))
    assert [row["step"] for row in lines(workdir) if "knn_top1" in row] == [9, 18, 24]
    assert "learning rate 4.6875e-06 = base_lr 0.00015 * batch_size 8 / 256" in output
    assert "k-NN top-1, this encoder" in output


def test_running_a_complete_run_again_changes_nothing(tiny, finished):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    output = run(tiny, workdir)
    assert "already complete" in output
    assert "k-NN top-1, this encoder" in output
    assert (workdir / "metrics.jsonl").read_text() == before


def test_killed_and_stopped_runs_end_bit_identical(tiny, finished, tmp_path):
    """kill -9 as soon as a checkpoint is there, then SIGTERM, then to the end."""
    process = start(tiny, tmp_path)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    process.kill()
    process.communicate()

    process = start(tiny, tmp_path)
    wait_for(process, (tmp_path / "checkpoints" / "15").exists)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    if "already" not in output and "After 24 steps" not in output:  # it may have been too fast
        assert "SIGTERM: saving, then stopping" in output
        assert "the same command resumes" in output

    output = run(tiny, tmp_path)
    assert_same_end(tmp_path, finished[0])
    steps = [row["step"] for row in lines(tmp_path) if "loss" in row]
    assert steps == list(range(2, 25, 2))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optim.base_lrr=1.0"], "no such config key: 'base_lrr'"),
        (["--config.batch_size=many"], "many"),
        (["--config.mask.ratio=1.0"], "mask.ratio=1.0 keeps 0 of 6 patches"),
        (["--config.data.path=/nowhere"], "/nowhere"),
        (["--config.model.image_size=(16, 20)"], "20 = 2 * 8 + 4"),
        (["stray"], "unexpected argument 'stray'"),
    ],
    ids=str,
)
def test_bad_input_is_one_clear_error(tiny, tmp_path, overrides, message):
    output = run(tiny, tmp_path / "run", *overrides, code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, output
    assert message in errors[0]
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_resuming_another_model_is_an_error_with_keys_and_shapes(tiny, finished):
    workdir, _ = finished
    output = run(tiny, workdir, "--config.model.width=32", "--config.seed=1", code=2)
    assert "model.width: 16 -> 32" in output
    assert "seed: 0 -> 1" in output
    allow = "--config.resume.allow=model.width"
    output = run(tiny, workdir, "--config.model.width=32", allow, code=2)
    assert "! encoder/cls_token has shape (1, 1, 16), the model needs (1, 1, 32)" in output


def test_resuming_beyond_the_end_is_an_error(tiny, finished):
    workdir, _ = finished
    output = run(tiny, workdir, "--config.steps=20", "--config.resume.allow=steps", code=2)
    assert f"error: the run has 20 steps, and {workdir} already holds its step 24" in output


def test_a_corrupt_image_is_an_error_with_its_name(tiny, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "5.png").write_bytes(b"not an image")
    path = f"--config.data.path={tmp_path}/images"
    output = run(tiny, tmp_path / "run", path, code=2)
    assert "images/5.png is bad: its bytes are not an image" in output
    assert "Traceback" not in output
    output = run(tiny, tmp_path / "run", path, "--config.data.on_bad=skip")
    assert "skipped a bad image (1 so far)" in output
    assert "After 24 steps" in output


def test_warm_start(tiny, finished, tmp_path):
    """A learning rate of 0 shows that a run begins with another's parameters."""
    source, converted = finished[0], tmp_path / "converted"
    convert = [sys.executable, "-m", "mae_jax.convert", str(source), str(converted)]
    convert += ["--to", "mae_jax"]
    subprocess.run(convert, check=True, env=environment(), cwd=ROOT)
    flags = ["--config.steps=1", "--config.optim.warmup_steps=0", "--config.optim.base_lr=0.0"]
    output = run(tiny, tmp_path / "b", *flags, f"--config.init.path={converted}")
    assert "arrays loaded" in output
    from mae_jax.convert import weights

    before, after = (weights.read(path) for path in (source, tmp_path / "b"))
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(after.arrays[name], array)
    output = run(tiny, tmp_path / "b", *flags, "--config.init.path=gone.pth")
    assert "already complete" in output  # a resumed run does not read init.path


def test_warm_start_from_nothing(tiny, tmp_path):
    flags = command(tiny, tmp_path / "run", "--config.init.path=gone.pth")
    made = subprocess.run(flags, capture_output=True, text=True, env=environment())
    assert made.returncode == 2
    assert made.stderr.splitlines()[-1] == "error: init.path: gone.pth does not exist"
