"""Hardware, software versions and CPU time of a measurement."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")  # per second, the unit of /proc


def environment() -> dict[str, Any]:
    """Return date, git commit, CPU, memory, operating system and GPUs."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "git_changed": bool(_output("git", "-C", str(ROOT), "status", "--porcelain")),
        "processor": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Return name, driver, clocks (MHz) and power limit of every NVIDIA GPU, by nvidia-smi."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader").splitlines()


def _output(*command: str) -> str:
    """Return what a command prints, "" if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_model() -> str:
    """Return the model name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if "model name" in line:
            return line.split(":")[1].strip()
    return platform.processor()


def versions(packages: Collection[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed."""
    installed = {"python": platform.python_version()}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and all its descendants, running or reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # it has just exited
        return 0.0
    own = sum(int(ticks) for ticks in fields[11:15]) / CLOCK_TICKS
    return own + sum(map(cpu_seconds, children))
