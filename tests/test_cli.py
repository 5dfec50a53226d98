"""train.py as its users run it: real processes, real files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
TINY = """
import sys
sys.path.insert(0, {root!r})
from configs import common


def get_config():
    config = common.base()
    config.batch_size = 8
    config.steps = 24
    config.model.update(image_size=(16, 24), patch=8, width=16, depth=2, heads=2)
    config.model.update(decoder_width=16, decoder_depth=1, decoder_heads=2)
    config.optim.warmup_steps = 4
    config.optim.ema = 0.9
    config.data.update(source="folder", path={folder!r}, workers=0, eval_split="val")
    config.eval.update(knn_every_epochs=3.0, pictures_every_epochs=3.0, pictures=2)
    config.log.every_steps = 2
    config.checkpoint.every_steps = 5
    return config
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config file, and the folder of noise in two classes that it trains on."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name, low in (("dark", 0), ("light", 128)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(low, low + 128, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    config = folder / "tiny.py"
    config.write_text(TINY.format(root=str(ROOT), folder=str(folder)))
    return config


def command(config, workdir, *overrides):
    flags = ["--config", str(config), "--workdir", str(workdir)]
    return [sys.executable, str(ROOT / "train.py"), *flags, *overrides]


def environment(tmp_path):
    return os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200", "PYTHONWARNINGS": "default"}


def run(config, workdir, *overrides, code=0):
    done = subprocess.run(
        command(config, workdir, *overrides),
        capture_output=True,
        text=True,
        env=environment(workdir),
        timeout=240,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(config, workdir):
    return subprocess.Popen(
        command(config, workdir),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(workdir),
    )


def wait_for(process, condition):
    """Until the condition holds, or the process ends first, which fails."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def final_arrays(workdir):
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        step = workdir.absolute() / "checkpoints" / "24"
        items = {item: reader.restore(step / item) for item in ("params", "train")}
    return jax.tree.leaves(items)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(tiny, workdir)


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_promises(finished):
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


def test_running_it_again_changes_nothing(tiny, finished):
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
        assert "the same command continues from here" in output

    output = run(tiny, tmp_path)
    straight, _ = finished
    for ours, theirs in zip(final_arrays(tmp_path), final_arrays(straight), strict=True):
        np.testing.assert_array_equal(ours, theirs)
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


def test_another_model_is_refused_by_key_and_by_parameter(tiny, finished):
    workdir, _ = finished
    output = run(tiny, workdir, "--config.model.width=32", "--config.seed=1", code=2)
    assert "model.width: 16 -> 32" in output
    assert "seed: 0 -> 1" in output
    allow = "--config.resume.allow=model.width"
    output = run(tiny, workdir, "--config.model.width=32", allow, code=2)
    assert "! encoder/cls_token has shape (1, 1, 16), the model needs (1, 1, 32)" in output


def test_a_corrupt_image_ends_the_run_with_its_name(tiny, tmp_path):
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
    subprocess.run(convert, check=True, env=environment(tmp_path), cwd=ROOT)
    flags = ["--config.steps=1", "--config.optim.warmup_steps=0", "--config.optim.base_lr=0.0"]
    output = run(tiny, tmp_path / "b", *flags, f"--config.init.path={converted}")
    assert "arrays loaded" in output
    from mae_jax.convert import weights

    before, after = (weights.read(path) for path in (source, tmp_path / "b"))
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(after.arrays[name], array)
    output = run(tiny, tmp_path / "b", *flags, "--config.init.path=gone.pth")
    assert "already complete" in output  # a run that has begun needs its init.path no more


def test_warm_start_from_nothing(tiny, tmp_path):
    flags = command(tiny, tmp_path / "run", "--config.init.path=gone.pth")
    made = subprocess.run(flags, capture_output=True, text=True, env=environment(tmp_path))
    assert made.returncode == 2
    assert made.stderr.splitlines()[-1] == "error: init.path: gone.pth does not exist"
