"""benchmarks.step from its flags to its table, with transformers and timm themselves."""

import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from benchmarks import agreement, step

ROOT = Path(__file__).parent.parent.parent
TINY = "--size vit_ti16 --batch 2 --dtype f32"


@pytest.mark.parametrize(("task", "peer"), [("train", "hf"), ("encode", "hf"), ("encode", "timm")])
def test_ratios_of_the_same_work(tmp_path, task, peer):
    flags = f"--task {task} {TINY} --impl mae_jax,{peer} --rounds 2 --burst-seconds 0.1"
    flags += f" --path timm={os.environ['TIMM']} --json {tmp_path / 'out.json'}"
    command = [sys.executable, "-m", "benchmarks.step", *flags.split()]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert f"{task} vit_ti16, batch 2, f32" in made.stdout
    assert "round 2 of 2" in made.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["status"] == "complete"
    assert report["differences"] == {}
    ours, theirs = report["rows"]
    assert (ours["implementation"], theirs["implementation"]) == ("mae_jax", peer)
    assert 0 < theirs["ratio"]["min"] <= theirs["ratio"]["median"] <= theirs["ratio"]["max"]
    assert theirs["cpu_ratio"]["median"] > 0
    assert [sorted(turn) for turn in report["rounds"]] == [sorted(["mae_jax", peer])] * 2


def test_other_weights_are_refused():
    arguments = step.parse(f"--task train {TINY} --impl mae_jax,hf".split())
    with ExitStack() as stack:
        run = step.Run(arguments, stack)
        ours = run.workers["mae_jax"].ask("check")
        path = run.folder / "hf" / "model.safetensors"
        tensors = load_file(path)
        tensors["decoder.decoder_pred.bias"] = tensors["decoder.decoder_pred.bias"] + 0.1
        save_file(tensors, path, {"format": "pt"})
        theirs = run.workers["hf"].ask("check")
        compared = run.workers["mae_jax"].ask("compare", name="hf")
    lines = agreement.disagreements("f32", ours, theirs, compared)
    assert any(line.startswith("the loss is") for line in lines)
    assert any(line.startswith("the updates are") for line in lines)


def test_an_official_checkout_that_fails_is_named(tmp_path):
    (tmp_path / "models_mae.py").write_text("import nothing_of_this_name\n")
    flags = f"--task train {TINY} --impl mae_jax,official --official-repo {tmp_path}"
    command = [sys.executable, "-m", "benchmarks.step", *flags.split()]
    command += ["--path", f"official={os.environ['TIMM']}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2
    assert f"--official-repo {tmp_path}: models_mae fails: ModuleNotFoundError" in made.stderr
    assert "Traceback" not in made.stderr
