"""The parts of benchmarks.step that compute: what it runs on real models is in tests/interop."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import agreement, machine, step, step_report
from benchmarks.workers.protocol import UnusableError, Worker, WorkerError

ROOT = Path(__file__).parent.parent
PREPARING = ("grain", "tensorflow_datasets", "tensorflow", "ml_collections", "array_record")


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("benchmarks.step", (*PREPARING, "jax", "torch")),
        ("benchmarks.workers.ours", (*PREPARING, "torch", "orbax", "tensorboardX")),
        ("benchmarks.workers.peers", (*PREPARING, "jax", "flax")),
    ],
)
def test_it_imports_little(module, without):
    code = f"import sys, {module}; print(*{set(without)!r} & set(sys.modules))"
    made = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (made.returncode, made.stdout.strip()) == (0, ""), made.stderr


# The same work


def first_step(params, gradients, *, rate=1e-3, decay=0.05):
    """As AdamW's first, in float32; what has one axis, blocks apart, is not decayed."""
    after = {}
    for name, start in params.items():
        decayed = decay * start if name.endswith("kernel") else 0
        after[name] = (start - rate * (np.sign(gradients[name]) + decayed)).astype(np.float32)
    return after


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    shapes = {"blocks/attn/qkv/kernel": (2, 8, 24), "blocks/attn/qkv/bias": (2, 24)}
    params, gradients = (
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(2)
    )
    return params, gradients, first_step(params, gradients)


def answer(**changes):
    return {"parameters": 1000, "loss": 1.0, "grad_norm": 2.0, "next_loss": 0.9} | changes


def test_the_same_step_agrees(case):
    params, _, after = case
    compared = agreement.compare_updates(params, after, after)
    assert compared == {"flipped": 0, "update": 0}
    assert agreement.disagreements("f32", answer(), answer(), compared) == []


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("change", [dict(rate=1.1e-3), dict(decay=0.0), dict(decay=0.1)])
def test_another_rate_or_decay_is_seen(case, change, dtype):
    """Also where rounding has turned some updates around."""
    params, gradients, after = case
    gradients["blocks/attn/qkv/kernel"].ravel()[::100] *= -1
    other = first_step(params, gradients, **change)
    compared = agreement.compare_updates(params, after, other)
    lines = agreement.disagreements(dtype, answer(), answer(), compared)
    assert any(line.startswith("the updates are") for line in lines)


def test_parameters_that_are_no_numbers_are_seen(case):
    params, _, after = case
    broken = after | {"blocks/attn/qkv/bias": np.full_like(after["blocks/attn/qkv/bias"], np.nan)}
    compared = agreement.compare_updates(params, after, broken)
    lines = agreement.disagreements("bf16", answer(), answer(), compared)
    assert any(line.startswith("the updates are nan") for line in lines)


def test_other_gradients_are_seen(case):
    params, gradients, after = case
    rng = np.random.default_rng(1)
    gradients = {name: rng.standard_normal(x.shape) for name, x in gradients.items()}
    compared = agreement.compare_updates(params, after, first_step(params, gradients))
    assert compared["flipped"] == pytest.approx(0.5, abs=0.1)
    assert agreement.disagreements("bf16", answer(), answer(), compared)


def test_key_biases_say_nothing(case):
    params, gradients, after = case
    gradients["blocks/attn/qkv/bias"][:, 8:16] *= -1
    compared = agreement.compare_updates(params, after, first_step(params, gradients))
    assert compared == {"flipped": 0, "update": 0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(parameters=999), "999 parameters instead of 1,000"),
        (dict(loss=1.001), "the loss is 0.001 apart (1.001 against 1); at most 0.0001 may be"),
        (dict(loss=float("nan")), "the loss is nan apart"),
        (dict(grad_norm=1.9), "the norm of the gradient is 0.05 apart"),
        (dict(next_loss=0.95), "the loss after a step is 0.056 apart"),
    ],
)
def test_what_differs_is_said(change, said):
    (line,) = agreement.disagreements("f32", answer(), answer(**change), {})
    assert line.startswith(said)


def test_tokens_are_compared():
    expected = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
    apart = agreement.relative(expected * np.float32(1.01), expected)
    assert apart == pytest.approx(0.01, rel=1e-4)
    ours = {"parameters": 1}
    (line,) = agreement.disagreements("f32", ours, ours, {"tokens": apart})
    assert line == "the tokens are 0.01 apart; at most 0.0001 may be"
    assert agreement.disagreements("bf16", ours, ours, {"tokens": apart}) == []


# Numbers


def test_rounds_go_there_and_back():
    assert list(step.turns(["a", "b", "c"], 3)) == [
        ["a", "b", "c"],
        ["c", "b", "a"],
        ["a", "b", "c"],
    ]


def test_a_ratio_pairs_the_bursts_of_a_round():
    """A machine that slows down by half a round's end moves no ratio."""
    rounds = [
        {"mae_jax": {"wall": 2.0 * slow, "steps": 4}, "hf": {"wall": 3.0 * slow, "steps": 2}}
        for slow in (1, 1, 5, 9)
    ]
    assert set(step_report.ratios(rounds, "hf", "wall").values()) == {3.0}
    assert step_report.spread([1.0, 2.0, 3.0, 4.0, 9.0]) == {
        "median": 3.0,
        "q1": 2.0,
        "q3": 4.0,
        "min": 1.0,
        "max": 9.0,
    }
    assert step_report.spread([2.0])["q3"] == 2.0


def test_warm_up_ends_when_times_are_steady():
    bursts = lambda *walls: [{"wall": wall, "steps": 2} for wall in walls]
    assert not step.steady(bursts(1.0, 1.0))
    assert not step.steady(bursts(1.0, 1.0, 1.03))
    assert step.steady(bursts(5.0, 1.0, 1.0, 1.01))


def test_flops_of_an_image():
    assert step_report.image_flops("train", "vit_h14", 256) / 1e9 == pytest.approx(290.99, abs=5e-3)
    assert step_report.image_flops("encode", "vit_b16", 196) / 1e9 == pytest.approx(35.13, abs=1e-2)


def report_of(ratio):
    rows = [{"implementation": "mae_jax"}, {"implementation": "hf", "ratio": {"median": ratio}}]
    return {"rows": rows, "checks": {"mae_jax": {"last_loss": 1.0}, "hf": {"last_loss": 1.0}}}


def test_a_missed_ratio_is_an_exit_status(capsys):
    assert step_report.verdict(report_of(0.9), None) == 0
    assert step_report.verdict(report_of(1.1), 1.0) == 0
    assert step_report.verdict(report_of(0.9), 1.0) == 1
    assert capsys.readouterr().err == "hf: 0.900, below --min-ratio 1.0\n"
    report = report_of(1.1)
    report["checks"]["hf"]["last_loss"] = float("nan")
    assert step_report.verdict(report, None) == 1


def test_a_busy_process_is_seen():
    code = "import time; begin = time.process_time()\nwhile time.process_time() < begin + .3: pass"
    busy = machine.busy_seconds()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert machine.busy_seconds() - busy > 0.2


# Flags


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--task train --impl mae_jax,timm", "--impl timm has no masked autoencoder"),
        ("--task encode --impl mae_jax,official", "--impl official is for --task train"),
        ("--impl mae_jax,official", "--impl official needs --official-repo DIR"),
        ("--impl hf,timm", "'hf,timm' must name each once, and mae_jax among them"),
        ("--impl mae_jax,keras", "'keras' is none of mae_jax, hf,"),
        ("--impl mae_jax --min-ratio 1", "--min-ratio needs a peer in --impl"),
        ("--path timm=/nowhere", "/nowhere does not exist"),
        ("--rounds 0", "'0' is not a number from 1 up"),
        ("--burst-seconds nan", "'nan' is not a number above 0"),
    ],
)
def test_flags_that_cannot_be(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        step.parse(flags.split())
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_paths_are_for_a_library_or_for_one_of_its_forms(tmp_path):
    (tmp_path / "models_mae.py").touch()
    flags = f"--impl official,official_compile,mae_jax --official-repo {tmp_path}"
    arguments = step.parse([*flags.split(), "--path", f"official={tmp_path}"])
    assert arguments.impl == ["mae_jax", "official", "official_compile"]
    assert step.of_family(arguments.path, "official_compile") == tmp_path
    assert step.of_family(arguments.path, "hf") is None


# Workers

TALK = """
import sys
from benchmarks.workers.protocol import UnusableError, serve

def refuse():
    raise UnusableError("not here")

def fail():
    print("last words")
    raise ValueError("broken")

serve(lambda: {"add": lambda a, b: {"sum": a + b}, "refuse": refuse, "fail": fail})
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "talk.py").write_text(TALK)
    made = Worker(
        "talk",
        ["talk"],
        interpreter=sys.executable,
        first=tmp_path,
        environment={},
        log=tmp_path / "log",
    )
    yield made
    made.end()


def test_a_worker_answers(worker):
    assert worker.ask("add", a=1, b=2) == {"sum": 3}
    with pytest.raises(UnusableError, match="^talk: not here$"):
        worker.ask("refuse")
    assert worker.ask("add", a=2, b=2) == {"sum": 4}


def test_a_worker_that_dies_is_quoted(worker):
    with pytest.raises(WorkerError, match="(?s)'fail'; it said\nlast words.*ValueError: broken$"):
        worker.ask("fail")
    with pytest.raises(WorkerError, match="talk ended with status 1"):
        worker.ask("add", a=1, b=1)


def test_ending_leaves_no_process(worker):
    worker.ask("add", a=1, b=1)
    worker.end()
    assert not Path(f"/proc/{worker.pid}").exists()


def test_the_plan_is_json(tmp_path):
    arguments = step.parse(
        ["--task", "encode", "--size", "vit_h14", "--impl", "mae_jax,timm_compile"]
    )
    plan = json.loads(json.dumps(step.make_plan(arguments, tmp_path)))
    assert plan["patches"] == 256
    assert plan["peers"] == {"timm_compile": "timm"}
