"""The suite of one GPU as it is started, at its tiny sizes; cut by SIGTERM and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def start(out, *flags):
    command = [sys.executable, "-m", "benchmarks.gpu_suite", f"--out={out}", *flags]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def read_rows(out):
    path = out / "suite.json"
    return (
        {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    )


def test_a_suite_that_is_cut_keeps_what_it_has_and_goes_on(tmp_path):
    flags = ("--tiny", "--only=profile-l,kernels-b")
    suite = start(tmp_path, *flags)
    while "kernels-b" not in read_rows(tmp_path):
        assert suite.poll() is None, suite.communicate()
        time.sleep(0.2)
    time.sleep(1)
    suite.send_signal(signal.SIGTERM)
    printed, _ = suite.communicate(timeout=60)
    assert suite.returncode == 143
    assert "TINY sizes on cpu" in " ".join(printed.split())
    rows = read_rows(tmp_path)
    assert [row["status"] for row in rows.values()] == ["done", "stopped"]
    kernels = rows["kernels-b"]["result"]
    assert kernels["linears"]["tflops"] > 0
    assert kernels["ceiling"]["flops_per_s"] > 0
    by = {row["implementation"]: row for row in kernels["attention"] if row["tokens"] == 5}
    assert by["xla"]["distance"] < 0.02
    assert "cudnn" in by["cudnn"]["error"].lower()

    again = start(tmp_path, *flags)
    printed, told = again.communicate(timeout=600)
    assert again.returncode == 0, told
    assert "kernels-b is done already" in told
    assert "not measured" in printed
    rows = read_rows(tmp_path)
    assert rows["kernels-b"]["date"] < rows["profile-l"]["date"]
    found = rows["profile-l"]["result"]
    assert found["platform"] == "cpu"
    assert sum(found["categories"].values()) == pytest.approx(1)
    assert sum(found["parts"].values()) == pytest.approx(1)
    assert found["categories"]["matmul"] > 0.01
    assert found["unknown"] == 0
    parts = ("encoder forward", "encoder backward", "decoder forward", "decoder backward")
    assert all(found["parts"][part] > 0 for part in parts)
    assert len(found["longest"]) == 20


def test_without_a_gpu_it_refuses(tmp_path):
    suite = start(tmp_path / "out")
    _, told = suite.communicate(timeout=60)
    assert suite.returncode == 2
    assert "error: JAX finds no GPU but cpu: install" in told
    assert not (tmp_path / "out").exists()
