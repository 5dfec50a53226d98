"""The real ViT-H on 64 and 256 devices, compiled: python -m pytest tests/slow (minutes)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HUGE = "--size=vit_h14 --per-device-batch=32 --remat=full --strategy=fsdp"


def run(flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.scaling", *flags.split()]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def huge(tmp_path_factory):
    """Reports and standard error by the number of devices."""
    found = {}
    for devices in (64, 256):
        path = tmp_path_factory.mktemp("scaling") / "report.json"
        done = run(f"{HUGE} --devices={devices} --json={path}")
        assert done.returncode == 0, done.stderr
        found[devices] = json.loads(path.read_text()), done.stderr
    return found


@pytest.mark.parametrize("devices", [64, 256])
def test_a_split_state_is_gathered_twice_and_activations_never(huge, devices):
    report, stderr = huge[devices]
    assert report["global_batch_arrays"] == report["foreign_arrays"] == []
    assert report["all_gather_bytes"] <= 2.1 * report["params_bytes"]
    assert report["all_reduce_bytes"] <= 1.1 * report["params_bytes"]
    assert report["all_to_all_bytes"] == report["collective_permute_bytes"] == 0
    assert report["temp_bytes_per_device"] < 3e9
    assert "Involuntary full rematerialization" not in stderr


def test_more_devices_need_no_more_memory_each(huge):
    few, many = (huge[devices][0] for devices in (64, 256))
    assert many["temp_bytes_per_device"] <= 1.1 * few["temp_bytes_per_device"]
    assert many["args_bytes_per_device"] < few["args_bytes_per_device"]


def test_a_state_that_does_not_divide_ends_with_2():
    done = run("--size=vit_2b --devices=512 --strategy=fsdp")
    assert done.returncode == 2
    assert "error: mesh.fsdp=512 leaves 29 % of the parameters and optimizer whole" in done.stderr
