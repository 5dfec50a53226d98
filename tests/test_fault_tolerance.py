"""Stopping on request, on bad numbers and on silence."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mae_jax.train.fault_tolerance import NonFiniteGuard, PreemptionHandler

ROOT = Path(__file__).parent.parent
GOOD = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0}
BAD = {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0}


class Notes(list):
    def __call__(self, step, values):
        self.append((step, values))


def make_guard(**kwargs):
    defaults = dict(max_bad_steps=3, spike_sigmas=6.0, images=lambda step: [f"{step}.png"] * 9)
    defaults |= dict(note_skipped=Notes(), note_spike=Notes())
    return NonFiniteGuard(**(defaults | kwargs))


def test_halts_after_bad_steps_in_a_row(caplog):
    notes = Notes()
    guard = make_guard(note_skipped=notes)
    for step, metrics in enumerate([BAD, BAD, GOOD, BAD, BAD]):
        assert guard.check(step, metrics)
    assert not guard.halted
    assert not guard.check(5, BAD)
    assert not guard.check(6, GOOD), "one more step may be under way when it halts"
    assert guard.halted
    assert [step for step, _ in notes] == [0, 1, 3, 4, 5]
    assert notes[-1][1] == {"loss": "nan", "grad_norm": "inf", "images": ["5.png"] * 9}
    assert "step 5 is skipped (3 in a row, of at most 3): loss nan, grad_norm inf" in caplog.text
    assert "5.png and 6 more" in caplog.text


def losses(guard, values):
    for step, loss in enumerate(values):
        assert guard.check(step, GOOD | {"loss": loss})


def test_spikes_are_flagged(caplog):
    notes = Notes()
    usual = [1.0 + 0.01 * (step % 5) for step in range(40)]
    losses(make_guard(note_spike=notes), [*usual, 2.0, *usual[:3]])
    assert notes == [(40, {"loss_spike": 2.0})]
    assert (
        "the loss jumps at step 40: 2.0000, after 1.0200 on average of the last 40" in caplog.text
    )


def test_what_is_no_spike():
    notes = Notes()
    losses(make_guard(note_spike=notes), [1.0, 1.1, 5.0])  # too early to know
    losses(make_guard(note_spike=notes), [1 - step / 100 + 0.01 * (step % 5) for step in range(90)])
    losses(make_guard(note_spike=notes, spike_sigmas=0.0), [1.0, 1.1] * 30 + [100.0])
    assert notes == []


def test_stop_signal_restores_what_was_there():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionHandler() as stop:
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
    assert signal.getsignal(signal.SIGTERM) is before


HANG = """
import sys, time, pathlib
from mae_jax.train.fault_tolerance import Watchdog


def stuck():
    time.sleep(60)


with Watchdog(float(sys.argv[1]) / 60, pathlib.Path(sys.argv[2])) as watchdog:
    for _ in range(8):
        time.sleep(0.25)
        watchdog.note("counting")
    if sys.argv[3] == "hang":
        watchdog.note("waiting for what never comes")
        stuck()
"""


@pytest.mark.parametrize(
    ("seconds", "what", "code"), [(1, "hang", 1), (1, "end", 0), (0, "end", 0)]
)
def test_a_process_that_hangs_ends_itself(tmp_path, seconds, what, code):
    command = [sys.executable, "-c", HANG, str(seconds), str(tmp_path), what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=50)
    assert done.returncode == code, done.stderr
    if code:
        assert "What it was at: waiting for what never comes" in done.stderr
        assert "in stuck" in (tmp_path / "stacks_0.txt").read_text()
        assert "in stuck" in done.stderr
