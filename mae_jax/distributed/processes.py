"""The processes of one run: joining them, agreeing with each other, leaving together."""

import logging
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax")

ENV_VARS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
TASK_COUNT_VARS = (
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
)  # in the environment of srun and mpirun
WAIT_NOTICE_S = 20.0  # seconds after which waiting for them is worth a word
INIT_TIMEOUT_S = 300  # seconds that processes wait for each other at the start
HEARTBEAT_TIMEOUT_S = 20  # seconds without a sign of life after which a process counts as dead
SHUTDOWN_TIMEOUT_S = 60  # seconds that processes wait for each other at the end


def initialize(wanted: bool) -> None:
    """Joins the other processes of this run, where `wanted` or where the environment names some.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say it outright. Of SLURM, Open
    MPI, Kubernetes and TPU, jax finds out itself.

    Raises:
      ValueError: that is wanted, and nothing says who the others are; or what says it is wrong.
    """
    given = [name for name in ENV_VARS if name in os.environ]
    announced = any(_number(name, 0) > 1 for name in TASK_COUNT_VARS if name in os.environ)
    if not given and not wanted and not announced:
        return
    who: dict[str, Any] = {}
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        if missing := sorted(set(ENV_VARS) - set(given)):
            raise UserError(f"{' and '.join(given)} need {' and '.join(missing)} beside them")
        who = {"num_processes": _number(ENV_VARS[1], 1), "process_id": _number(ENV_VARS[2], 0)}
        if who["process_id"] >= who["num_processes"]:
            raise UserError(
                f"JAX_PROCESS_ID={who['process_id']} is not below JAX_NUM_PROCESSES="
                f"{who['num_processes']}: processes are counted from 0"
            )
    if "JAX_COORDINATOR_ADDRESS" in given:
        _check_address(os.environ[ENV_VARS[0]], is_there=who.get("process_id") == 0)
    patience = threading.Timer(WAIT_NOTICE_S, _log_waiting)  # jax aborts in the end
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **who,
            cluster_detection_method="deactivate" if who else None,
            initialization_timeout=INIT_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"--distributed: nothing says which processes belong together ({error}). Start them "
            "with scripts/launch_local.sh, srun or mpirun, or set " + ", ".join(ENV_VARS)
        ) from error
    finally:
        patience.cancel()


def _log_waiting() -> None:
    log.warning(
        "still waiting for the other processes of this run, for %d seconds at most: are all "
        "started, with the same JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES?",
        INIT_TIMEOUT_S,
    )


def _check_address(address: str, *, is_there: bool) -> None:
    """ValueError unless it is HOST:PORT; where it `is_there`, unless the port is free."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address!r} is not HOST:PORT, as in 10.0.0.1:8476"
        )
    if not is_there:
        return
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise UserError(
            f"{ENV_VARS[0]}={address}: port {port} cannot be used on this machine "
            f"({error.strerror}): choose another, the same for all processes"
        ) from error


def _number(name: str, least: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < least:
        raise UserError(f"{name}={text!r} is not a number from {least} up")
    return int(text)


def is_main() -> bool:
    """Whether this is the process that writes what all have in common."""
    return jax.process_index() == 0


@contextmanager
def raise_together() -> Iterator[None]:
    """Raises on every process what its block raises on any of them.

    Without it a process that fails alone leaves the others waiting for it. See `is_told`.
    """
    if jax.process_count() == 1:
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        mine = error
    packed = b"" if mine is None else pickle.dumps((type(mine), str(mine)))
    for number, found in enumerate(_allgather_bytes(packed)):
        if found:
            # The first of them, so that all go on alike, also where they fail in different ways.
            is_mine = mine is not None and number == jax.process_index()
            error: Any = mine if is_mine else _reconstruct_error(number, found)
            error.__dict__["told"] = not is_main()
            raise error


def _reconstruct_error(number: int, packed: bytes) -> Exception:
    """The error of another process."""
    kind, text = pickle.loads(packed)
    try:
        return kind(f"process {number}: {text}")
    except TypeError:  # some need more than a message
        return RuntimeError(f"process {number}: {kind.__name__}: {text}")


def already_reported(error: Exception) -> bool:
    """Whether the main process has raised an error, or its cause, and so told of it, too."""
    return any(getattr(found, "told", False) for found in (error, error.__cause__))


def _allgather_bytes(mine: bytes) -> list[bytes]:
    """What every process has."""
    sizes = multihost_utils.process_allgather(np.int32(len(mine)))
    if not sizes.any():
        return [b""] * len(sizes)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


def assert_equal_across_processes(values: Mapping[str, str]) -> None:
    """Raise UserError, on every process, unless all have the same text under each name."""
    if jax.process_count() == 1:
        return
    mine = b"".join(sha256(text.encode()).digest() for text in values.values())
    found = np.stack(
        [np.frombuffer(row, np.uint8).reshape(len(values), -1) for row in _allgather_bytes(mine)]
    )
    differs = (found != found[0]).any(axis=2)
    if differs.any():
        number, which = np.argwhere(differs)[0]
        error = UserError(
            f"process {number} has another {list(values)[which]} than process 0: all processes of "
            "a run need the same command, the same data and the same workdir"
        )
        error.__dict__["told"] = not is_main()
        raise error


def barrier() -> None:
    """Returns when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_all")


def shutdown(code: int, *, at_once: bool = False) -> NoReturn:
    """Ends this process after an error, without waiting for others that may wait for it.

    These notice its silence. Those that leave for the same reason fall with the main process, so
    that leaves last. A process alone waits for its threads unless it is to end `at_once`.
    """
    several = jax.distributed.is_initialized()
    if not several and not at_once:
        sys.exit(code)
    if several and is_main():
        time.sleep(2.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
