"""Preemption, the NaN/Inf guard and the hang watchdog."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from mae_jax.train.fault_tolerance import NonFiniteGuard, PreemptionHandler, Watchdog

ROOT = Path(__file__).parent.parent
GOOD = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0}
BAD = {"loss": float("nan"), "grad_norm": float("inf"), "skipped": 1.0}


class Calls(list):
    def __call__(self, step, values):
        self.append((step, values))


def make_guard(**kwargs):
    options = dict(max_bad_steps=3, spike_sigmas=6.0, on_skip=Calls(), on_spike=Calls())
    options |= dict(image_names=lambda step: [f"{step}.png"] * 9)
    return NonFiniteGuard(**(options | kwargs))


def test_aborts_after_consecutive_bad_steps(caplog):
    calls = Calls()
    guard = make_guard(on_skip=calls)
    for step, metrics in enumerate([BAD, BAD, GOOD, BAD, BAD]):
        assert guard.check(step, metrics)
    assert not guard.aborted
    assert not guard.check(5, BAD)
    assert not guard.check(6, GOOD), "one more step may be running when it aborts"
    assert guard.aborted
    assert [step for step, _ in calls] == [0, 1, 3, 4, 5]
    assert calls[-1][1] == {"loss": "nan", "grad_norm": "inf", "images": ["5.png"] * 9}
    message = "skipped step 5 (NaN/Inf, 3 consecutive, at most 3): loss nan, grad_norm inf"
    assert message in caplog.text
    assert "5.png and 6 more" in caplog.text


def check_losses(guard, values):
    for step, loss in enumerate(values):
        assert guard.check(step, GOOD | {"loss": loss})


def test_loss_spikes_are_flagged(caplog):
    calls = Calls()
    usual = [1.0 + 0.01 * (step % 5) for step in range(40)]
    check_losses(make_guard(on_spike=calls), [*usual, 2.0, *usual[:3]])
    assert calls == [(40, {"loss_spike": 2.0})]
    message = "loss spike at step 40: 2.0000, after a mean of 1.0200 over the last 40 steps"
    assert message in caplog.text


def test_other_losses_are_no_spikes():
    calls = Calls()
    check_losses(make_guard(on_spike=calls), [1.0, 1.1, 5.0])  # too few steps
    falling = [1 - step / 100 + 0.01 * (step % 5) for step in range(90)]
    check_losses(make_guard(on_spike=calls), falling)
    check_losses(make_guard(on_spike=calls, spike_sigmas=0.0), [1.0, 1.1] * 30 + [100.0])
    assert calls == []


def test_preemption_handler_restores_the_signal_handlers():
    before = signal.getsignal(signal.SIGTERM)
    with PreemptionHandler() as preemption:
        assert not preemption(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption(2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_heartbeat_postpones_the_watchdog(tmp_path):
    now = [0.0]
    watchdog = Watchdog(1.0, tmp_path, clock=lambda: now[0])
    for seconds in (59.0, 118.0):
        now[0] = seconds
        assert not watchdog.expired
        watchdog.heartbeat("counting")
    now[0] = 178.5
    assert watchdog.expired
    never = Watchdog(0.0, tmp_path, clock=lambda: now[0])
    now[0] = 1e9
    assert not never.expired


HANG = """
import pathlib, sys, threading
from mae_jax.train.fault_tolerance import Watchdog


def stuck():
    threading.Event().wait()


with Watchdog(0.01, pathlib.Path(sys.argv[1])) as watchdog:
    watchdog.heartbeat("waiting for an event that never comes")
    stuck()
"""


def test_a_hanging_process_dumps_its_stacks_and_exits(tmp_path):
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "while waiting for an event that never comes" in done.stderr
    assert "in stuck" in (tmp_path / "stacks_0.txt").read_text()
    assert "in stuck" in done.stderr
