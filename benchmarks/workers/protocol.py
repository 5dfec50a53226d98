"""Commands to worker processes and their answers, each a line of JSON, over pipes.

The worker's standard output is the pipe of its answers: whatever else a library prints goes to its
standard error, which is a file.
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
from typing import Any, Protocol

ROOT = Path(__file__).parent.parent.parent
TAIL = 2000  # characters of a worker's last words


class UnusableError(Exception):
    """What was asked for cannot be done here; the message says why and names the flag."""


class WorkerError(Exception):
    """A worker ended before it was told to; the message holds its last words."""


class Job(Protocol):
    """What a worker runs again and again."""

    def run(self) -> Any:
        """One step, which the device may still be computing afterwards."""
        ...

    def wait(self) -> None:
        """Returns once all that was begun is done."""
        ...


def burst(job: Job, steps: int) -> dict[str, float]:
    """Runs so many steps: seconds of the clock, and of the processor over all threads."""
    job.wait()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        job.run()
    job.wait()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "steps": steps}


def serve(make: Callable[[], Mapping[str, Callable[..., dict[str, Any]]]]) -> None:
    """The whole life of a worker: `make` gives its commands, which are answered in order.

    It ends where its standard input does, so it never outlives who started it.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    commands: Mapping[str, Callable[..., dict[str, Any]]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            commands = commands or make()
            answer = commands[request.pop("command")](**request)
        except UnusableError as error:
            answer = {"unusable": str(error)}
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        answers.write(json.dumps(answer) + "\n")


class Worker:
    """A process that answers commands.

    Args:
      name: of the implementation; interpreter: its Python; first: a folder to import from before
      all others, if any; log: the file that takes its standard error.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        interpreter: str,
        first: Path | None,
        environment: Mapping[str, str],
        log: Path,
    ):
        self.name, self._log = name, log
        paths = [str(first)] if first else []
        paths += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [interpreter, "-m", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | environment | {"PYTHONPATH": os.pathsep.join(paths)},
                text=True,
                start_new_session=True,  # a Ctrl-C is for the driver, which ends its workers
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a command.

        Raises:
          UnusableError: the worker says so.
          WorkerError: it ended instead.
        """
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death(command) from None
        line = self._process.stdout.readline()
        if not line:
            raise self._death(command)
        answer = json.loads(line)
        if "unusable" in answer:
            raise UnusableError(f"{self.name}: {answer['unusable']}")
        return answer

    def _death(self, command: str) -> WorkerError:
        status = self._process.wait()
        said = self._log.read_text(errors="replace")[-TAIL:].strip()
        return WorkerError(
            f"the worker of {self.name} ended with status {status} at {command!r}; it said\n{said}"
        )

    def end(self) -> None:
        """Ends the process and all that it has started."""
        with contextlib.suppress(ProcessLookupError):  # where all are gone already
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
