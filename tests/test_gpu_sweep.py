"""benchmarks.gpu_sweep: its rows, and resuming from its JSON."""

import json

import pytest

from benchmarks import gpu_sweep, step


def test_rows_have_flags_that_the_step_benchmark_accepts():
    rows = gpu_sweep.rows()
    assert next(iter(rows)) == "b-peers"
    assert rows["b-base"] == rows["b-base-again"]
    for flags in rows.values():
        step.parse(flags)
    assert [step.parse(rows[f"b-xla-{n}"]).xla_flags for n in range(14)] == gpu_sweep.XLA_FLAGS


def test_sweep_resumes_and_retries_failed_rows(tmp_path, monkeypatch, capsys):
    ran, failing = [], {"--attention=cudnn"}

    def run_row(flags):
        ran.append(flags[-1])
        if failing & set(flags):
            return {"flags": flags, "error": "log\nno cuDNN"}
        row = {"implementation": "mae_jax", "step_s": {"median": 0.05}}
        return {"flags": flags, "rows": [row | {"images_per_s": 5100.0, "mfu_peak": 0.4}]}

    monkeypatch.setattr(gpu_sweep, "run_row", run_row)
    command = ["--json", str(tmp_path / "sweep.json"), "--only", "b-[cx]*n*"]
    with pytest.raises(SystemExit) as exit_info:
        gpu_sweep.main(command)
    assert exit_info.value.code == 1
    assert "b-cudnn failed: no cuDNN" in capsys.readouterr().out
    failing.clear()
    gpu_sweep.main(["--json", str(tmp_path / "sweep.json"), "--only", "b-[cxr]*"])
    assert ran.count("--attention=cudnn") == 2
    assert ran.count("--attention=xla") == ran.count("--remat=dots") == 1
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["b-cudnn", "mae_jax", "50.00", "5,100.0", "40.0%"] in table
    results = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert all("rows" in result for result in results.values())
    gpu_sweep.main(["--json", str(tmp_path / "sweep.json"), "--only", "b-xla", "--", "--batch=2"])
    assert ran[-1] == "--batch=2"  # other flags: not a row that is done
