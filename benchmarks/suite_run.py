"""Runs the rows of a suite within a time, each a process, and keeps what is done."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import machine, suite_report
from mae_jax.utils.atomic import write_json

log = logging.getLogger("mae_jax")

ROOT = Path(__file__).parent.parent
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "timm")
LONGER = 3.0  # times its estimate, and LEAST seconds, is what a row may take before it is stopped
LEAST = 180.0
GRACE = 15.0  # seconds that a row has to end when told to


@dataclass(frozen=True)
class Row:
    """A run of a benchmark: its flags without dashes, and about how many seconds it takes."""

    name: str
    module: str
    flags: dict[str, Any]
    estimate: float
    why: str

    @property
    def arguments(self) -> list[str]:
        """As on the command line, in one form only, so that equal rows are equal."""
        return [self.module, *(f"--{name}={value}" for name, value in self.flags.items())]


def expected_seconds(row: Row, done: Sequence[dict[str, Any]]) -> float:
    """A row's estimate, corrected by what rows of the same module took, or else all rows."""
    alike = [each for each in done if each["command"][0] == row.module] or done
    return row.estimate * median([each["seconds"] / each["estimate"] for each in alike] or [1.0])


class Suite:
    """The rows that are done in a folder, and the report of them.

    Args:
      about: platform, device and whether it is tiny, which rows in one folder have in common;
      environment: of the rows' processes; beside: flags of all rows of `benchmarks.step`.

    Raises:
      ValueError: the folder holds rows of another device, or no readable ones.
    """

    def __init__(
        self,
        folder: Path,
        about: dict[str, Any],
        environment: dict[str, str],
        beside: Sequence[str],
        *,
        fresh: bool,
    ):
        self._folder, self._beside = folder, list(beside)
        paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        self._environment = environment | {"PYTHONPATH": os.pathsep.join(paths)}
        self._path = folder / "suite.json"
        before = [] if fresh else _read_rows(self._path, about)
        self.report: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.gpu_suite", *sys.argv[1:]]),
            **about,
            "environment": machine.environment(),
            "versions": machine.versions(PACKAGES),
            "rows": before,
            "left_out": [],
            "goals": suite_report.goals(before, about),
        }
        self._about = about

    def run(self, rows: Sequence[Row], seconds: float) -> None:
        """Runs the rows that are not done yet, as many as fit."""
        begin = time.monotonic()
        for number, row in enumerate(rows):
            left = seconds - (time.monotonic() - begin)
            done = [each for each in self.report["rows"] if each["status"] == "done"]
            if any(each["name"] == row.name and self._same(each, row) for each in done):
                log.info("row %d of %d: %s is done already", number + 1, len(rows), row.name)
                continue
            expected = expected_seconds(row, done)
            if expected > left:
                self.report["left_out"].append({"name": row.name, "expected_s": round(expected)})
                self._write()
                continue
            log.info(
                "row %d of %d: %s, about %.0f s; %s gone, %s left",
                *(number + 1, len(rows), row.name, expected),
                *(_clock(seconds - left), _clock(left)),
            )
            self._run_row(row, min(left, max(LONGER * expected, LEAST)))
        self.report["environment"]["gpus_at_end"] = machine.gpus()
        self._write()

    def _same(self, done: dict[str, Any], row: Row) -> bool:
        return done["command"] == self._command(row)

    def _command(self, row: Row) -> list[str]:
        beside = self._beside if row.module == "benchmarks.step" else []
        return [*row.arguments, *beside]

    def _run_row(self, row: Row, most: float) -> None:
        """Runs one, and adds it to the report however it ends."""
        result = self._folder / f"{row.name}.json"
        result.unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        entry = {"name": row.name, "why": row.why, "command": self._command(row)}
        entry |= {"estimate": row.estimate, "date": machine.environment()["date"]}
        begin = time.monotonic()
        ended = {"status": "stopped", "error": "the suite was stopped"}
        try:
            ended = self._process(row.name, [*self._command(row), f"--json={result}"], most)
            if ended["status"] == "done":
                ended["result"] = json.loads(result.read_text())
        finally:
            entry |= {"seconds": round(time.monotonic() - begin, 1)} | ended
            self.report["rows"] = [r for r in self.report["rows"] if r["name"] != row.name]
            self.report["rows"].append(entry)
            self._write()
            if "error" in ended:
                log.info("%s: %s", row.name, ended["error"])

    def _process(self, name: str, command: list[str], most: float) -> dict[str, Any]:
        """How a row's process ended; it and what it started is gone after."""
        path = self._folder / f"{name}.log"
        with path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,  # a Ctrl-C is for the suite, which ends the row
            )
            try:
                status = process.wait(most)
            except subprocess.TimeoutExpired:
                return {"status": "stopped", "error": f"stopped after {most:.0f} s"}
            finally:
                _end(process)
        if status == 0:
            return {"status": "done"}
        return {
            "status": "failed",
            "error": suite_report.last_words(path.read_text("utf8", "replace")),
        }

    def _write(self) -> None:
        self.report["goals"] = suite_report.goals(self.report["rows"], self._about)
        write_json(self._path, self.report)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks a process and its children to end, and does not wait for long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _read_rows(path: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that a suite has left; none where there was none."""
    if not path.exists():
        return []
    advice = "give another --out, or --fresh to forget them"
    try:
        report = json.loads(path.read_text())
        found = {name: report[name] for name in about}
        rows = report["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}): {advice}") from None
    if found != about:
        raise ValueError(f"{path} holds rows of {found}, and this is {about}: {advice}")
    return rows


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
