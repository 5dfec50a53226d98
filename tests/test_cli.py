"""train.py as its users run it: real processes, real files."""

import importlib.util
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
    lines,
    run,
    save_first_state,
    start,
    wait_for,
    write_tiny,
)

from mae_jax.convert import __main__ as convert
from mae_jax.convert import weights
from mae_jax.distributed.checkpoint_reader import CheckpointError
from mae_jax.train.config import from_config_dict
from mae_jax.train.trainer import train_and_evaluate
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten


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
    assert lines(workdir)[0] == {"step": 0, "epoch": 0.0} | {
        f"yardstick_{name}": loss for name, loss in summary["yardsticks"].items()
    }
    assert summary["yardsticks"]["patch_mean"] == pytest.approx(1.0, abs=0.01)
    assert "yardsticks, losses without a network on 24 training images: 0.99" in output


def test_running_a_complete_run_again_changes_nothing(tiny, finished):
    workdir, _ = finished
    before = (workdir / "metrics.jsonl").read_text()
    output = run(tiny, workdir)
    assert "already complete" in output
    assert "k-NN top-1, this encoder" in output
    assert (workdir / "metrics.jsonl").read_text() == before


def test_a_stopped_run_resumes_and_ends_bit_identical(tiny, finished, tmp_path):
    """SIGTERM once a checkpoint exists; tests/faults has kill -9 and more."""
    process = start(tiny, tmp_path)
    wait_for(process, (tmp_path / "checkpoints" / "5").exists)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    if "After 24 steps" not in output:  # it may have been too fast
        assert "SIGTERM: saving, then stopping" in output
        assert "the same command resumes" in output

    first_output, output = output, run(tiny, tmp_path)
    assert_same_end(tmp_path, finished[0])
    assert "yardsticks, losses" in first_output
    assert "yardsticks, losses" not in output, "measured once"
    for text in (first_output + output, finished[1]):  # these few steps teach nothing
        assert text.count("beats no yardstick") == 1
    written = [(w / "yardsticks.json").read_text() for w in (tmp_path, finished[0])]
    assert written[0] == written[1]
    steps = [row["step"] for row in lines(tmp_path) if "loss" in row]
    assert steps == list(range(2, 25, 2))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.optim.base_lrr=1.0"], "no such config key: 'base_lrr'"),
        (["--config.mask.ratio=1.0"], "mask.ratio=1.0 keeps 0 of 6 patches"),
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


def test_an_unknown_size_is_one_clear_error(tmp_path):
    output = run(ROOT / "configs" / "pretrain.py:vit_foo", tmp_path / "run", code=2)
    assert "error: unknown model size 'vit_foo'; known: vit_ti16" in output
    assert "Traceback" not in output


def test_help_has_flags_and_exit_codes():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--help"], capture_output=True, text=True
    )
    for text in ("--workdir", "--config", "--distributed", "--config.mask.ratio", "Exit codes: 0"):
        assert text in done.stdout


def config_of(tiny, **overrides):
    """Return the config of the file as train.py reads it, with overrides."""
    spec = importlib.util.spec_from_file_location("tiny", tiny)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    return from_config_dict(config)


def test_resuming_another_run_is_an_error(tiny, finished):
    workdir, _ = finished
    with pytest.raises(CheckpointError, match=r"model.width: 16 -> 32\n  seed: 0 -> 1\n"):
        train_and_evaluate(config_of(tiny, model__width=32, seed=1), workdir)
    allowed = dict(model__width=32, resume__allow="model.width")
    message = r"! encoder/cls_token has shape \(1, 1, 16\), the model needs \(1, 1, 32\)"
    with pytest.raises(CheckpointError, match=message):
        train_and_evaluate(config_of(tiny, **allowed), workdir)
    shorter = config_of(tiny, steps=20, resume__allow="steps")
    with pytest.raises(UserError, match="the run has 20 steps, and .* already holds its step 24"):
        train_and_evaluate(shorter, workdir)


def test_a_corrupt_image_is_an_error_with_its_name(tiny, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.new("RGB", (20, 20)).save(tmp_path / "images" / f"{i}.png")
    (tmp_path / "images" / "5.png").write_bytes(b"not an image")
    output = run(tiny, tmp_path / "run", f"--config.data.path={tmp_path}/images", code=2)
    assert "images/5.png is bad: its bytes are not an image" in output
    assert "Traceback" not in output


def test_warm_start(tiny, finished, tmp_path):
    source, converted = finished[0], tmp_path / "converted"
    convert.main([str(source), str(converted), "--to", "mae_jax"])
    state = save_first_state(config_of(tiny, init__path=str(converted)), tmp_path / "b")
    expected = weights.read(source).arrays
    for tree in (state.params, state.ema):
        for name, array in flatten(tree).items():
            np.testing.assert_array_equal(array, expected[name])
    # A complete run does not read init.path.
    train_and_evaluate(config_of(tiny, init__path="gone.pth"), source)
    with pytest.raises(UserError, match=r"^init.path: gone.pth does not exist$"):
        train_and_evaluate(config_of(tiny, init__path="gone.pth"), tmp_path / "c")
