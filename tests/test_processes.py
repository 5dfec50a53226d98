"""Who belongs to a run. Runs of several processes are in tests/faults."""

import os
import socket
import subprocess
import sys

import pytest

from mae_jax.distributed import processes


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    for name in (*processes.ENV_VARS, *processes.TASK_COUNT_VARS):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jax.distributed.initialize", lambda **_: pytest.fail("it joined"))


def test_one_process_joins_nobody(monkeypatch):
    processes.initialize(False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    processes.initialize(False)


@pytest.mark.parametrize(
    ("environment", "who"),
    [
        ({"SLURM_STEP_NUM_TASKS": "8"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            {"num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_the_environment_says_who_belongs_together(monkeypatch, environment, who):
    found = {}
    monkeypatch.setattr("jax.distributed.initialize", found.update)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.initialize(False)
    assert who.items() <= found.items()
    assert found["heartbeat_timeout_seconds"] < 60


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES need JAX_COORDINATOR_ADDRESS and JAX_PROC"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES='two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 is not below"),
        ({"JAX_COORDINATOR_ADDRESS": "nonsense"}, "'nonsense' is not HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "a:99999"}, "'a:99999' is not HOST:PORT"),
        ({"SLURM_STEP_NUM_TASKS": "abc"}, "SLURM_STEP_NUM_TASKS='abc' is not a number"),
    ],
)
def test_an_environment_that_cannot_be(monkeypatch, environment, message):
    if len(environment) == 2:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        processes.initialize(False)


def test_a_port_in_use_is_named(monkeypatch):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        with pytest.raises(ValueError, match=f"port {port} cannot be used"):
            processes.initialize(False)


def test_the_flag_alone_does_not_say_who():
    code = "from mae_jax.distributed import processes; processes.initialize(True)"
    environment = {name: os.environ[name] for name in os.environ if not name.startswith("JAX_")}
    environment["JAX_PLATFORMS"] = "cpu"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "ValueError: --distributed: nothing says which processes belong" in done.stderr


def test_one_process_agrees_with_itself():
    processes.assert_equal_across_processes({"config": "a"})
    processes.barrier()
    with pytest.raises(ZeroDivisionError), processes.raise_together():
        raise ZeroDivisionError
    assert processes.is_main()
    with pytest.raises(SystemExit):
        processes.shutdown(2)
