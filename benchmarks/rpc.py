"""Remote procedure calls to worker processes: lines of JSON over stdin and stdout.

The stdout of a worker carries its responses only: everything else that is printed there goes to its
stderr, which is a log file.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mae_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
LOG_TAIL = 2000  # characters of the log that an error quotes


class UnusableError(UserError):
    """A worker cannot run as requested; the message gives the reason and the flag."""


class WorkerError(Exception):
    """A worker died; the message quotes the end of its log."""


def time_steps(job: Any, steps: int) -> dict[str, float]:
    """Time `steps` calls of job.run(), which may be asynchronous until job.wait().

    Returns wall seconds, CPU seconds of all threads, and the number of steps.
    """
    job.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        job.run()
    job.wait()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "steps": steps}


def serve(make_commands: Callable[[], Mapping[str, Callable[..., dict[str, Any]]]]) -> None:
    """Answer commands in order until stdin ends, so that a worker never outlives its parent."""
    responses = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands: Mapping[str, Callable[..., dict[str, Any]]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            commands = commands or make_commands()
            response = commands[request.pop("command")](**request)
        except UnusableError as error:
            response = {"unusable": str(error)}
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        responses.write(json.dumps(response) + "\n")


class Worker:
    """A process that answers commands.

    Args:
      name: of the implementation.
      command: module and arguments to run it with.
      interpreter: Python executable.
      path: folder to put first on its PYTHONPATH.
      environment: additional environment variables.
      log: file for its stderr.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        interpreter: str,
        path: Path | None,
        environment: Mapping[str, str],
        log: Path,
    ):
        self.name, self._log = name, log
        paths = [str(path)] if path else []
        paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [interpreter, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
                text=True,
                start_new_session=True,  # Ctrl-C goes to the parent, which closes its workers
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Return the response to a command.

        Raises:
          UnusableError: the worker reports that it cannot run as requested.
          WorkerError: the worker died.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died(command) from None
        line = self._process.stdout.readline()
        if not line:
            raise self._died(command)
        response = json.loads(line)
        if "unusable" in response:
            raise UnusableError(f"{self.name}: {response['unusable']}")
        return response

    def _died(self, command: str) -> WorkerError:
        status = self._process.wait()
        tail = self._log.read_text(errors="replace")[-LOG_TAIL:].strip()
        return WorkerError(
            f"the {self.name} worker exited with status {status} during {command!r}:\n{tail}"
        )

    def close(self) -> None:
        """Kill the process and its descendants."""
        with contextlib.suppress(ProcessLookupError):  # all have exited already
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
