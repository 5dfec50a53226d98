"""The compiled train step of ViT-H with FSDP on 64 and 256 virtual devices (minutes)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def reports():
    """Reports and stderr by the number of devices."""
    results = {}
    for devices in (64, 256):
        flags = f"--size=vit_h14 --remat=full --devices={devices} --fsdp={devices}"
        command = [sys.executable, "-m", "tests.compiled_step", *flags.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        results[devices] = json.loads(done.stdout), done.stderr
    return results


@pytest.mark.parametrize("devices", [64, 256])
def test_fsdp_gathers_parameters_twice_and_activations_never(reports, devices):
    report, stderr = reports[devices]
    assert report["non_parameter_sizes"] == []
    assert report["all_gather_bytes"] <= 2.1 * report["params_bytes"]
    assert report["all_reduce_bytes"] <= 1.1 * report["params_bytes"]
    assert report["all_to_all_bytes"] == report["collective_permute_bytes"] == 0
    assert report["temp_bytes"] < 3e9
    assert "Involuntary full rematerialization" not in stderr


def test_memory_per_device_does_not_grow_with_devices(reports):
    few, many = (reports[devices][0] for devices in (64, 256))
    assert many["temp_bytes"] <= 1.1 * few["temp_bytes"]
    assert many["argument_bytes"] < few["argument_bytes"]
