"""benchmarks.step: parity checks, ratios, flags and workers; tests/interop runs it with PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import interleaved, parity, step, step_report
from benchmarks.rpc import UnusableError, Worker, WorkerError

ROOT = Path(__file__).parent.parent
DATA = ("grain", "tensorflow_datasets", "tensorflow", "ml_collections", "array_record")


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("step", (*DATA, "torch", "flax", "orbax", "tensorboardX")),
        ("gpu_sweep", (*DATA, "torch", "flax", "orbax", "tensorboardX")),
        ("jax_worker", (*DATA, "torch", "orbax", "tensorboardX")),
        ("torch_worker", (*DATA, "jax", "flax")),
    ],
)
def test_modules_import_on_a_machine_without_the_data_packages(module, without):
    code = f"import sys, benchmarks.{module}; print(*{set(without)!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


# Parity


def first_step(params, gradients, *, rate=1e-3, decay=0.05):
    """Return the parameters after a first step of AdamW, which decays kernels only."""
    after = {}
    for name, start in params.items():
        decayed = decay * start if name.endswith("kernel") else 0
        after[name] = (start - rate * (np.sign(gradients[name]) + decayed)).astype(np.float32)
    return after


@pytest.fixture
def case():
    """Parameters, gradients, and the parameters after one step."""
    rng = np.random.default_rng(0)
    shapes = {"blocks/attn/qkv/kernel": (2, 8, 24), "blocks/attn/qkv/bias": (2, 24)}
    params, gradients = (
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    return params, gradients, first_step(params, gradients)


def result(**changes):
    return {"parameters": 1000, "loss": 1.0, "grad_norm": 2.0, "next_loss": 0.9} | changes


def test_equal_steps_pass(case):
    params, _, after = case
    compared = parity.compare_updates(params, after, after)
    assert compared == {"flipped": 0, "update": 0}
    assert parity.find_mismatches("f32", result(), result(), compared) == []


@pytest.mark.parametrize("change", [dict(rate=1.1e-3), dict(decay=0.0), dict(decay=0.1)])
def test_other_learning_rate_or_weight_decay_is_detected(case, change):
    """Also if rounding flipped the sign of some updates."""
    params, gradients, after = case
    gradients["blocks/attn/qkv/kernel"].ravel()[::100] *= -1
    compared = parity.compare_updates(params, after, first_step(params, gradients, **change))
    lines = parity.find_mismatches("bf16", result(), result(), compared)
    assert any(line.startswith("parameter updates: ") for line in lines)


def test_nan_parameters_are_detected(case):
    params, _, after = case
    broken = after | {"blocks/attn/qkv/bias": np.full_like(after["blocks/attn/qkv/bias"], np.nan)}
    compared = parity.compare_updates(params, after, broken)
    lines = parity.find_mismatches("bf16", result(), result(), compared)
    assert any(line.startswith("parameter updates: relative difference nan") for line in lines)


def test_other_gradients_are_detected_except_for_key_biases(case):
    params, gradients, after = case
    rng = np.random.default_rng(1)
    unrelated = {name: rng.standard_normal(x.shape) for name, x in gradients.items()}
    compared = parity.compare_updates(params, after, first_step(params, unrelated))
    assert compared["flipped"] == pytest.approx(0.5, abs=0.1)
    assert parity.find_mismatches("bf16", result(), result(), compared)
    gradients["blocks/attn/qkv/bias"][:, 8:16] *= -1  # of keys: the true gradient is zero
    compared = parity.compare_updates(params, after, first_step(params, gradients))
    assert compared == {"flipped": 0, "update": 0}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(parameters=999), "999 parameters instead of 1,000"),
        (dict(loss=1.001), "loss: relative difference 0.001 (1.001 vs 1) exceeds 0.0001"),
        (dict(loss=float("nan")), "loss: relative difference nan"),
        (dict(grad_norm=1.9), "gradient norm: relative difference 0.05"),
        (dict(next_loss=0.95), "loss after one step: relative difference 0.056"),
    ],
)
def test_mismatches_are_described(change, line):
    (found,) = parity.find_mismatches("f32", result(), result(**change), {})
    assert found.startswith(line)


def test_tokens_are_compared():
    expected = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    error = parity.relative_error(expected * np.float32(1.01), expected)
    assert error == pytest.approx(0.01, rel=1e-4)
    ours = {"parameters": 1}
    (line,) = parity.find_mismatches("f32", ours, ours, {"tokens": error})
    assert line == "encoder tokens: relative difference 0.01 exceeds 0.0001"
    assert parity.find_mismatches("bf16", ours, ours, {"tokens": error}) == []


# Interleaved rounds and the report


def test_rounds_alternate_their_order():
    orders = list(interleaved.round_orders(["a", "b", "c"], 3))
    assert orders == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_ratios_pair_the_bursts_of_a_round():
    """A machine that becomes slower between rounds changes no ratio."""
    rounds = [
        {"mae_jax": {"wall": 2.0 * slow, "steps": 4}, "hf": {"wall": 3.0 * slow, "steps": 2}}
        for slow in (1, 1, 5, 9)
    ]
    ratios = interleaved.ratios(rounds, "hf", "mae_jax", "wall")
    assert ratios == {"median": 3.0, "min": 3.0, "max": 3.0}
    spread = interleaved.spread([1.0, 2.0, 3.0, 4.0, 9.0])
    assert spread == {"median": 3.0, "min": 1.0, "max": 9.0}


def test_warm_up_ends_when_times_are_steady():
    bursts = lambda *walls: [{"wall": wall, "steps": 2} for wall in walls]
    assert not interleaved.is_steady(bursts(1.0, 1.0))
    assert not interleaved.is_steady(bursts(1.0, 1.0, 1.03))
    assert interleaved.is_steady(bursts(5.0, 1.0, 1.0, 1.01))


def test_stopwatch_counts_the_cpu_time_of_child_processes():
    stopwatch = interleaved.Stopwatch()
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert stopwatch.read()["cpu"] > 0.25


def test_flops_of_an_image():
    assert step_report.image_flops("train", "vit_h14") / 1e9 == pytest.approx(290.99, abs=5e-3)
    assert step_report.image_flops("encode", "vit_b16") / 1e9 == pytest.approx(35.13, abs=1e-2)


def test_missed_ratio_and_nan_loss_exit_with_1(capsys):
    rows = [{"implementation": "mae_jax"}, {"implementation": "hf", "ratio": {"median": 0.9}}]
    checks = {"mae_jax": {"last_loss": 1.0}, "hf": {"last_loss": 1.0}}
    report = {"rows": rows, "checks": checks}
    assert step_report.exit_code(report, None) == 0
    assert step_report.exit_code(report, 0.8) == 0
    assert step_report.exit_code(report, 1.0) == 1
    assert capsys.readouterr().err == "hf: 0.900, below --min-ratio 1.0\n"
    checks["hf"]["last_loss"] = float("nan")
    assert step_report.exit_code(report, None) == 1


def test_committed_reports_can_be_drawn(tmp_path):
    reports = sorted((ROOT / "docs" / "reports" / "data").glob("step_*.json"))
    assert reports
    step_report.draw([json.loads(path.read_text()) for path in reports], tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 10_000


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--task train --impl mae_jax,timm", "--impl timm has no masked autoencoder"),
        ("--task encode --impl mae_jax,official", "--impl official is for --task train"),
        ("--impl mae_jax,official", "--impl official needs --official-repo DIR"),
        ("--impl hf,timm", "'hf,timm' must include mae_jax, and each name once"),
        ("--impl mae_jax,keras", "'keras' is none of mae_jax, hf,"),
        ("--impl mae_jax --min-ratio 1", "--min-ratio needs a peer in --impl"),
        ("--path timm=/nowhere", "/nowhere does not exist"),
    ],
)
def test_bad_flags_exit_with_2(flags, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        step.parse(flags.split())
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_paths_apply_to_a_library_or_one_of_its_forms(tmp_path):
    (tmp_path / "models_mae.py").touch()
    flags = f"--impl official,official_compile,mae_jax --official-repo {tmp_path}"
    args = step.parse([*flags.split(), "--path", f"official={tmp_path}"])
    assert args.impl == ["mae_jax", "official", "official_compile"]
    assert step.for_library(args.path, "official_compile") == tmp_path
    assert step.for_library(args.path, "hf") is None
    plan = json.loads(json.dumps(step.make_plan(args, tmp_path)))
    assert plan["patches"] == 196
    assert plan["peers"] == {"official": "official", "official_compile": "official"}


# Workers

WORKER = """
from benchmarks.rpc import UnusableError, serve

def refuse():
    raise UnusableError("not here")

def fail():
    print("last words")
    raise ValueError("broken")

serve(lambda: {"add": lambda a, b: {"sum": a + b}, "refuse": refuse, "fail": fail})
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "example_worker.py").write_text(WORKER)
    worker = Worker(
        "example",
        ["example_worker"],
        interpreter=sys.executable,
        path=tmp_path,
        environment={},
        log=tmp_path / "log",
    )
    yield worker
    worker.close()


def test_worker_answers_and_closing_leaves_no_process(worker):
    assert worker.call("add", a=1, b=2) == {"sum": 3}
    with pytest.raises(UnusableError, match="^example: not here$"):
        worker.call("refuse")
    assert worker.call("add", a=2, b=2) == {"sum": 4}
    worker.close()
    assert not Path(f"/proc/{worker.pid}").exists()


def test_log_of_a_dead_worker_is_quoted(worker):
    with pytest.raises(WorkerError, match="(?s)'fail':\nlast words.*ValueError: broken$"):
        worker.call("fail")
    with pytest.raises(WorkerError, match="example worker exited with status 1"):
        worker.call("add", a=1, b=1)
