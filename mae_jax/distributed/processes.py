"""Multi-process setup, error propagation and shutdown."""

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
TASK_COUNT_VARS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")  # set by srun and mpirun
WAIT_NOTICE_S = 20.0  # seconds of waiting for other processes before a log message
INIT_TIMEOUT_S = 300  # seconds that processes wait for each other at the start
HEARTBEAT_TIMEOUT_S = 20  # seconds without a heartbeat after which a process counts as dead
SHUTDOWN_TIMEOUT_S = 60  # seconds that processes wait for each other at the end


def initialize(required: bool) -> None:
    """Connect to the other processes of this run, if `required` or if the environment names any.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them explicitly; jax detects
    SLURM, Open MPI, Kubernetes and TPU pods.

    Raises:
      UserError: the environment is invalid, or `required` and it names no other processes.
    """
    given = [name for name in ENV_VARS if name in os.environ]
    launched = any(_int_from_env(name, 0) > 1 for name in TASK_COUNT_VARS if name in os.environ)
    if not given and not required and not launched:
        return
    explicit: dict[str, Any] = {}
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        if missing := sorted(set(ENV_VARS) - set(given)):
            raise UserError(f"{' and '.join(given)} also need {' and '.join(missing)}")
        explicit["num_processes"] = _int_from_env("JAX_NUM_PROCESSES", 1)
        explicit["process_id"] = _int_from_env("JAX_PROCESS_ID", 0)
        if explicit["process_id"] >= explicit["num_processes"]:
            raise UserError(
                f"JAX_PROCESS_ID={explicit['process_id']} must be below JAX_NUM_PROCESSES="
                f"{explicit['num_processes']}: it counts from 0"
            )
    if "JAX_COORDINATOR_ADDRESS" in given:
        is_coordinator = explicit.get("process_id") == 0
        _check_address(os.environ["JAX_COORDINATOR_ADDRESS"], is_coordinator=is_coordinator)
    notice = threading.Timer(WAIT_NOTICE_S, _log_waiting)
    notice.daemon = True
    notice.start()
    try:
        jax.distributed.initialize(
            **explicit,
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=INIT_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, ImportError) as error:
        raise UserError(
            f"--distributed: the other processes of the run are unknown ({error}). Start them with "
            "scripts/launch_local.sh, srun or mpirun, or set " + ", ".join(ENV_VARS)
        ) from error
    finally:
        notice.cancel()


def _log_waiting() -> None:
    log.warning(
        "still waiting for the other processes of this run, for %d seconds at most: check that all "
        "are started, with the same JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES",
        INIT_TIMEOUT_S,
    )


def _check_address(address: str, *, is_coordinator: bool) -> None:
    """Raise UserError unless it is HOST:PORT, with a free port on the coordinator itself."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address!r} is not HOST:PORT, as in 10.0.0.1:8476"
        )
    if not is_coordinator:
        return
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address}: port {port} cannot be used on this machine "
            f"({error.strerror}): choose another, the same for all processes"
        ) from error


def _int_from_env(name: str, low: int) -> int:
    text = os.environ[name]
    if not text.isdecimal() or int(text) < low:
        raise UserError(f"{name}={text!r} is not an integer >= {low}")
    return int(text)


def is_main() -> bool:
    """Return whether this is the process that logs and writes what all processes share."""
    return jax.process_index() == 0


@contextmanager
def raise_together() -> Iterator[None]:
    """Raise on every process what the block raises on any of them, instead of a deadlock.

    If several processes fail, all raise the error of the first. See `already_reported`.
    """
    if jax.process_count() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    messages = _allgather_bytes(pickle.dumps((type(own), str(own))) if own else b"")
    failed = [process for process, message in enumerate(messages) if message]
    if failed:
        first = failed[0]
        is_own = own is not None and first == jax.process_index()
        raise _mark_reported(own if is_own else _reconstruct_error(first, messages[first]))


def _reconstruct_error(process: int, message: bytes) -> Exception:
    """Return the error of another process."""
    error_type, text = pickle.loads(message)
    try:
        return error_type(f"process {process}: {text}")
    except TypeError:  # its constructor takes more than a message
        return RuntimeError(f"process {process}: {error_type.__name__}: {text}")


def _mark_reported(error: Any) -> Exception:
    """Return an error that all processes raise, which only the main process has to report."""
    error.reported_by_main = not is_main()
    return error


def already_reported(error: Exception) -> bool:
    """Return whether the main process reports this error, or its cause, as well."""
    return any(getattr(e, "reported_by_main", False) for e in (error, error.__cause__))


def _allgather_bytes(own: bytes) -> list[bytes]:
    """Return the bytes of every process."""
    sizes = multihost_utils.process_allgather(np.int32(len(own)))
    if not sizes.any():
        return [b""] * len(sizes)
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]


def assert_equal_across_processes(values: Mapping[str, str]) -> None:
    """Raise UserError, on every process, unless all have the same text under each name."""
    if jax.process_count() == 1:
        return
    own = b"".join(sha256(text.encode()).digest() for text in values.values())
    hashes = np.stack(
        [np.frombuffer(row, np.uint8).reshape(len(values), -1) for row in _allgather_bytes(own)]
    )
    differs = (hashes != hashes[0]).any(axis=2)
    if differs.any():
        process, index = np.argwhere(differs)[0]
        raise _mark_reported(
            UserError(
                f"process {process} has another {list(values)[index]} than process 0: all "
                "processes of a run need the same command, the same data and the same workdir"
            )
        )


def barrier() -> None:
    """Wait until every process has reached this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("wait_for_all")


def shutdown(code: int, *, immediate: bool = False) -> NoReturn:
    """Exit after an error, without waiting for other processes that may be blocked.

    These detect the missing heartbeat. The main process exits last: it is the coordinator, and its
    end terminates the others before they can report. A single process waits for its threads unless
    `immediate`.
    """
    multi_process = jax.distributed.is_initialized()
    if not multi_process and not immediate:
        sys.exit(code)
    if multi_process and is_main():
        time.sleep(2.0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
