"""Multi-process setup from the environment. Runs of several processes are in tests/faults."""

import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from mae_jax.distributed import processes
from mae_jax.utils.errors import UserError


@pytest.fixture(autouse=True)
def no_processes(monkeypatch):
    for name in (*processes.ENV_VARS, *processes.TASK_COUNT_VARS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("it connected"))


def test_a_single_process_does_not_connect(monkeypatch):
    processes.initialize(False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.initialize(False)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            {"num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_the_environment_names_the_processes(monkeypatch, environment, expected):
    arguments = {}
    monkeypatch.setattr("jax.distributed.initialize", arguments.update)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.initialize(False)
    assert expected.items() <= arguments.items()
    assert ("process_id" in arguments) == ("process_id" in expected)
    assert arguments["heartbeat_timeout_seconds"] < 60


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES also need JAX_COORDINATOR_ADDRESS and JA"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES='two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 must be below"),
        ({"JAX_COORDINATOR_ADDRESS": "nonsense"}, "'nonsense' is not HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:99999"}, "'a:99999' is not HOST:PORT"),
        ({"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS='abc' is not an integer"),
    ],
)
def test_invalid_environments(monkeypatch, environment, message):
    if len(environment) == 2:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.initialize(False)


def test_a_port_in_use_is_an_error(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(UserError, match=f"port {port} cannot be used"):
            processes.initialize(False)


def test_the_flag_needs_an_environment():
    """With the real `jax.distributed.initialize`, hence in another process."""
    code = "from mae_jax.distributed import processes; processes.initialize(True)"
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("JAX_")}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "UserError: --distributed: the other processes of the run are unknown" in done.stderr


def test_a_single_process_never_waits():
    processes.assert_equal_across_processes({"config": "a"})
    processes.barrier()
    with pytest.raises(ZeroDivisionError), processes.raise_together():
        raise ZeroDivisionError
    assert processes.is_main()
    with pytest.raises(SystemExit):
        processes.shutdown(2)


def fake_processes(monkeypatch, own, others):
    """Make this the process `own` of several; `others` maps processes to what they send."""

    def gather(payload):
        return [others.get(process, payload) for process in range(len(others) + 1)]

    monkeypatch.setattr("jax.process_count", lambda: len(others) + 1)
    monkeypatch.setattr("jax.process_index", lambda: own)
    monkeypatch.setattr(processes, "_allgather_bytes", gather)


def raised_together(error):
    """Return what `raise_together` raises if its block raises `error`, or nothing for None."""

    @processes.raise_together()
    def block():
        if error:
            raise error

    with pytest.raises(Exception) as raised:  # noqa: PT011
        block()
    return raised.value


def test_all_processes_raise_the_error_of_the_first(monkeypatch):
    sent = []
    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr(processes, "_allgather_bytes", lambda own: sent.append(own) or [own, own])
    key_error = UserError("must be positive", key="steps", value=-1)
    assert raised_together(key_error) is key_error
    assert not processes.already_reported(key_error), "the main process reports it"

    fake_processes(monkeypatch, 1, {0: sent[0]})
    for own in (None, ZeroDivisionError()):
        error = raised_together(own)
        assert isinstance(error, UserError)
        assert str(error) == "process 0: steps=-1 must be positive"
        assert processes.already_reported(error)
    fake_processes(monkeypatch, 1, {0: b""})
    with processes.raise_together():
        pass
    assert isinstance(raised_together(ZeroDivisionError()), ZeroDivisionError)


def test_processes_of_different_runs_are_an_error(monkeypatch):
    fake_processes(monkeypatch, 0, {1: bytes(64)})
    with pytest.raises(UserError, match="process 1 has another config than process 0"):
        processes.assert_equal_across_processes({"config": "a", "dataset": "b"})
    monkeypatch.setattr(processes, "_allgather_bytes", lambda own: [own, own])
    processes.assert_equal_across_processes({"config": "a", "dataset": "b"})


def test_bytes_of_different_lengths_are_gathered(monkeypatch):
    def allgather(x):
        x = np.asarray(x)
        other = np.int32(1) if x.ndim == 0 else np.array([7] + [0] * (len(x) - 1), np.uint8)
        return np.stack([x, other])

    monkeypatch.setattr(processes.multihost_utils, "process_allgather", allgather)
    assert processes._allgather_bytes(b"abc") == [b"abc", b"\x07"]
