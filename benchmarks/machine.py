"""What a measurement ran on, and what else ran there meanwhile."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TICKS = os.sysconf("SC_CLK_TCK")  # of the kernel's clocks in a second


def environment() -> dict[str, Any]:
    """Machine, time and the version of this project, for the JSON of a measurement."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "git_changed": bool(_output("git", "-C", str(ROOT), "status", "--porcelain")),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Name, driver, clocks (MHz) and limit of power of every NVIDIA GPU, as its driver tells."""
    asked = "name,driver_version,clocks.sm,clocks.mem,power.limit"
    return _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader").splitlines()


def _output(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    """The model of the processor."""
    found = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return found[0].split(":")[1].strip() if found else platform.processor()


def versions(packages: Collection[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_seconds(process: int) -> float:
    """Of a process and of all that it has started, be they alive or not."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()
        children = [
            int(child)
            for task in Path(f"/proc/{process}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0.0
    own = sum(int(ticks) for ticks in fields[11:15]) / TICKS
    return own + sum(map(cpu_seconds, children))


def busy_seconds() -> float:
    """Of the cores that this process may use, since the machine started, whoever used them."""
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    busy = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in cores:
            user, nice, system, _idle, _waiting, *interrupts = map(int, ticks[:8])
            busy += user + nice + system + sum(interrupts)  # and what a hypervisor stole
    return busy / TICKS
