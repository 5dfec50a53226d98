"""benchmarks.step end to end, with transformers and timm."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import parity, step

ROOT = Path(__file__).parent.parent.parent
TINY = "--size vit_ti16 --batch 2 --dtype f32"


@pytest.mark.parametrize(("task", "peer"), [("train", "hf"), ("encode", "hf"), ("encode", "timm")])
def test_ratios_of_equal_work(tmp_path, task, peer):
    flags = f"--task {task} {TINY} --impl mae_jax,{peer} --rounds 2 --burst-seconds 0.1"
    flags += f" --path timm={os.environ['TIMM']} --json {tmp_path / 'out.json'}"
    command = [sys.executable, "-m", "benchmarks.step", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{task} vit_ti16, batch 2, f32" in done.stdout
    assert "round 2 of 2" in done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["status"] == "complete"
    assert report["differences"] == {}
    ours, theirs = report["rows"]
    assert (ours["implementation"], theirs["implementation"]) == ("mae_jax", peer)
    assert 0 < theirs["ratio"]["min"] <= theirs["ratio"]["median"] <= theirs["ratio"]["max"]
    assert theirs["cpu_ratio"]["median"] > 0
    assert [sorted(turn) for turn in report["rounds"]] == [sorted(["mae_jax", peer])] * 2


def test_unequal_weights_are_detected():
    args = step.parse(f"--task train {TINY} --impl mae_jax,hf".split())
    with ExitStack() as stack:
        run = step.Run(args, stack)
        ours = run.workers["mae_jax"].call("check")
        path = run.folder / "hf" / "model.safetensors"
        tensors = load_file(path)
        tensors["decoder.decoder_pred.bias"] = tensors["decoder.decoder_pred.bias"] + 0.1
        save_file(tensors, path, {"format": "pt"})
        theirs = run.workers["hf"].call("check")
        compared = run.workers["mae_jax"].call("compare", name="hf")
    lines = parity.find_mismatches("f32", ours, theirs, compared)
    assert any(line.startswith("loss: ") for line in lines)
    assert any(line.startswith("parameter updates: ") for line in lines)


def test_import_error_of_an_official_checkout_is_reported(tmp_path):
    (tmp_path / "models_mae.py").write_text("import nothing_of_this_name\n")
    flags = f"--task train {TINY} --impl mae_jax,official --official-repo {tmp_path}"
    command = [sys.executable, "-m", "benchmarks.step", *flags.split()]
    command += ["--path", f"official={os.environ['TIMM']}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert (
        f"--official-repo {tmp_path}: importing models_mae failed: ModuleNotFoundError"
        in done.stderr
    )
    assert "Traceback" not in done.stderr
