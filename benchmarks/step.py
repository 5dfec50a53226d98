"""The train step and the encoder side by side with PyTorch peers, on the same work.

    python -m benchmarks.step --task train --size vit_b16 --batch 256 --dtype bf16 \
        --impl mae_jax,hf,hf_compile --json out.json

Every implementation has a process of its own, and all wait while one computes. mae_jax makes random
weights, images and masks, which the peers take over. Before anything is timed, losses, gradients
and one step of AdamW are compared (to encode: the tokens); where they differ no ratio is printed.
Then rounds are interleaved (A B C, C B A, ...), in each of which every implementation runs a burst
of steps. A ratio is the peer's time over that of mae_jax in the same round, so above 1 mae_jax is
faster; its median and quartiles are over the rounds.

Time is that of the model: images lie on the device, those of mae_jax as bytes, those of peers
normalised already. Our step also computes the gradient norm and keeps the state where that or the
loss is not finite, as train.py does; peers do neither. FLOPs are counted in the paper's form
whatever an implementation computes. "MFU" is against a matrix product that mae_jax measures on the
same device in the same run (benchmarks/workers/ceiling.py), "of peak" against the vendor's figure
for bfloat16. Memory is the device's, on a CPU the process's. "first s" is the first step with all
compiling.

Exits with 1 where implementations disagree, a worker dies, or --min-ratio is missed, and with 2
where something cannot be run.
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import agreement, machine, step_report
from benchmarks.step_report import IMAGE_SIZE, OURS
from benchmarks.workers.protocol import UnusableError, Worker, WorkerError
from mae_jax.models.variants import VARIANTS
from mae_jax.utils import console
from mae_jax.utils.atomic import atomic_path

log = logging.getLogger("mae_jax")

PEERS = ("hf", "hf_compile", "timm", "timm_compile", "official", "official_compile")
# The paper's AdamW but for eps, 1e-8 there: gradients of large models are small beside that, and a
# first update would tell how they are rounded. That step is one that shows, others are small.
RECIPE = dict(first_rate=1e-3, rate=1e-6, b1=0.9, b2=0.95, eps=1e-12, weight_decay=0.05)
# Threads of torch that wait for each other sleep soon: where other processes keep the cores busy,
# training ViT-S in bfloat16 took 4 times the processor time without.
PATIENT = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
PIXELS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CEILINGS = ("flops_per_s", "copy_bytes_per_s")
STEADY = 0.02  # relative difference of bursts that end the warm-up
WARM_UP, WARM_UP_CPU = 20, 5  # bursts at most


def family(name: str) -> str:
    """The library of a peer."""
    return name.removesuffix("_compile")


def turns(names: Sequence[str], rounds: int) -> Iterator[Sequence[str]]:
    """The order of every round: there, and back."""
    for number in range(rounds):
        yield names if number % 2 == 0 else names[::-1]


class Run:
    """The workers, and a report that is written after every stage."""

    def __init__(self, arguments: argparse.Namespace, stack: ExitStack):
        self._arguments = arguments
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.names: list[str] = arguments.impl
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps(make_plan(arguments, self.folder)))
        self.workers: dict[str, Worker] = {}
        for name in self.names:
            self.workers[name] = self._start(name, plan)
            stack.callback(self.workers[name].end)
        self.report: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
            "status": "started",
            "flags": vars(arguments),
            "recipe": RECIPE,
            "peers_environment": PATIENT,
            "environment": machine.environment(),
        }

    def _start(self, name: str, plan: Path) -> Worker:
        arguments = self._arguments
        command = ["benchmarks.workers.ours", str(plan)]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": arguments.xla_flags}
        if name != OURS:
            command = ["benchmarks.workers.peers", name, str(plan)]
            environment = {"HF_HUB_OFFLINE": "1"} | PATIENT
        return Worker(
            name,
            command,
            interpreter=str(of_family(arguments.python, name) or sys.executable),
            first=of_family(arguments.path, name),
            environment=environment,
            log=self.folder / f"{name}.log",
        )

    def stage(self, status: str) -> None:
        """Tells what comes next, and writes what is known so far."""
        log.info("%s", status)
        self.write(status)

    def write(self, status: str) -> None:
        self.report["status"] = status
        if self._arguments.json:
            with atomic_path(self._arguments.json) as part:
                part.write_text(json.dumps(self.report, indent=2, default=str) + "\n")

    def describe(self) -> None:
        """What every worker runs on; all have to be on the same kind of device."""
        self.stage("starting the workers")
        found = {name: worker.ask("describe") for name, worker in self.workers.items()}
        self.report["workers"] = found
        for name, told in found.items():
            if (told["platform"] == "cpu") != (found[OURS]["platform"] == "cpu"):
                raise UnusableError(
                    f"{name} computes on {told['device']}, but {OURS} on {found[OURS]['device']}: "
                    "install jax[cuda12] or a CUDA build of torch, or set JAX_PLATFORMS=cpu and "
                    "CUDA_VISIBLE_DEVICES="
                )

    @property
    def platform(self) -> str:
        return self.report["workers"][OURS]["platform"]

    def check(self) -> bool:
        """Whether all did the same work; says what differs."""
        self.report["checks"] = checks = {}
        self.report["differences"] = differences = {}
        for name, worker in self.workers.items():
            self.stage(f"{name}: compiling, and the first steps")
            checks[name] = worker.ask("check")
        for name in self.names[1:]:
            compared = self.workers[OURS].ask("compare", name=name)
            checks[name] |= compared
            found = agreement.disagreements(
                self._arguments.dtype, checks[OURS], checks[name], compared
            )
            differences |= {name: found} if found else {}
        for name, lines in differences.items():
            for line in lines:
                print(f"{name} does not do the work of {OURS}: {line}", file=sys.stderr)
        return not differences

    def measure(self) -> None:
        """The ceiling, bursts in turns, and the ceiling again, of which the better one counts.

        Raw values go to the report after every round.
        """
        self.stage("measuring what the device can do")
        self.report["ceiling"] = ceiling = self.workers[OURS].ask("ceiling")
        self.report["warm_up"] = {name: self._warm_up(name) for name in self.names}
        steps = {name: bursts[-1]["steps"] for name, bursts in self.report["warm_up"].items()}
        self.report["rounds"] = rounds = []
        begin, count = time.monotonic(), self._arguments.rounds
        for number, order in enumerate(turns(self.names, count)):
            left = (time.monotonic() - begin) / number * (count - number) if number else None
            shown = "" if left is None else f", {left:.0f} s left"
            self.stage(f"round {number + 1} of {count}{shown}")
            rounds.append({name: self._burst(name, int(steps[name])) for name in order})
        self.report["gpus_after"] = machine.gpus()
        again = self.workers[OURS].ask("ceiling")
        ceiling |= {name: max(ceiling[name], again[name]) for name in CEILINGS}
        for name, worker in self.workers.items():
            self.report["checks"][name]["last_loss"] = worker.ask("finish")["loss"]

    def _warm_up(self, name: str) -> list[dict[str, float]]:
        """Bursts of the length that is asked for, until three in a row take the same time."""
        self.stage(f"{name}: warming up")
        most = WARM_UP_CPU if self.platform == "cpu" else WARM_UP
        bursts, steps = [self._burst(name, 1)], 1
        while len(bursts) <= most and not steady(bursts[1:]):
            wall = bursts[-1]["wall"] / bursts[-1]["steps"]
            if len(bursts) < 3:  # the very first steps tell too little of how many to take
                steps = max(1, round(self._arguments.burst_seconds / wall))
            bursts.append(self._burst(name, steps))
        return bursts

    def _burst(self, name: str, steps: int) -> dict[str, float]:
        """What the worker tells, and the cores that other processes kept busy meanwhile."""
        begin, busy, own = time.perf_counter(), machine.busy_seconds(), self._own_seconds()
        found = self.workers[name].ask("burst", steps=steps)
        others = machine.busy_seconds() - busy - (self._own_seconds() - own)
        return found | {"others": max(0.0, others / (time.perf_counter() - begin))}

    def _own_seconds(self) -> float:
        workers = sum(machine.cpu_seconds(worker.pid) for worker in self.workers.values())
        return workers + time.process_time()


def steady(bursts: list[dict[str, float]]) -> bool:
    """Whether the last three take about the same time."""
    last = [burst["wall"] / burst["steps"] for burst in bursts[-3:]]
    return len(last) == 3 and max(last) - min(last) <= STEADY * median(last)


def of_family(given: dict[str, Path], name: str) -> Path | None:
    """What was given for an implementation, or for its library."""
    return given.get(name) or given.get(family(name))


def make_plan(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the workers have to know."""
    names = ("task", "size", "batch", "dtype", "remat", "scan_unroll", "attention", "compile_mode")
    patches = (IMAGE_SIZE // VARIANTS[arguments.size].patch) ** 2
    return {
        **{name: vars(arguments)[name] for name in names},
        **RECIPE,
        **PIXELS,
        "image_size": IMAGE_SIZE,
        "patches": patches,
        "peers": {name: family(name) for name in arguments.impl if name != OURS},
        "official_repo": str(arguments.official_repo),
        "folder": str(folder),
    }


def implementations(text: str) -> list[str]:
    """Names, mae_jax first."""
    names = text.split(",")
    for name in names:
        if name not in (OURS, *PEERS):
            known = ", ".join((OURS, *PEERS))
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    if OURS not in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} must name each once, and {OURS} among them")
    return [OURS, *(name for name in names if name != OURS)]


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def count(text: str) -> int:
    """A number from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def named_path(text: str) -> tuple[str, Path]:
    """ "timm=FOLDER"."""
    name, equals, path = text.partition("=")
    if not equals or name not in (OURS, *PEERS):
        raise argparse.ArgumentTypeError(f"{text!r} is not IMPL=PATH")
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return name, Path(path).absolute()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=str(__doc__).splitlines()[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--task", choices=("train", "encode"), default="train")
    add("--size", choices=VARIANTS, default="vit_b16")
    add("--batch", type=count, default=8, help="images (8)")
    add("--dtype", choices=("f32", "bf16"), default="bf16", help="of activations (bf16)")
    add("--impl", type=implementations, default=[OURS, "hf"], help=f"of {OURS}, {', '.join(PEERS)}")
    add("--official-repo", type=Path, metavar="DIR", help="a checkout of the official code")
    for flag, what in (("--python", "interpreter"), ("--path", "folder to import from first")):
        text = f"another {what} for an implementation; may be repeated"
        add(flag, type=named_path, action="append", default=[], metavar="IMPL=PATH", help=text)
    add("--rounds", type=count, default=10)
    add("--burst-seconds", type=positive, default=2.0)
    add("--remat", choices=("none", "dots", "full"), default="none", help="of mae_jax (none)")
    add("--scan-unroll", type=count, default=1, help="blocks per iteration, of mae_jax (1)")
    add("--attention", choices=("auto", "xla", "cudnn"), default="auto", help="of mae_jax (auto)")
    add("--xla-flags", default=os.environ.get("XLA_FLAGS", ""), help="XLA_FLAGS of mae_jax")
    add("--compile-mode", default="default", help="of torch.compile (default)")
    add("--min-ratio", type=positive, help="of the median ratio of time to every peer")
    add("--json", type=Path, help="file to write")
    arguments = parser.parse_args(argv)
    arguments.python, arguments.path = dict(arguments.python), dict(arguments.path)
    if reason := unusable(arguments):
        parser.error(reason)
    return arguments


def unusable(arguments: argparse.Namespace) -> str | None:
    """Why flags do not go together, if they do not."""
    families = {family(name) for name in arguments.impl}
    if arguments.task == "train" and "timm" in families:
        return "--impl timm has no masked autoencoder: it is for --task encode"
    if "official" in families:
        if arguments.task == "encode":
            return "--impl official is for --task train: to encode, its code is timm's"
        if not arguments.official_repo or not (arguments.official_repo / "models_mae.py").is_file():
            return "--impl official needs --official-repo DIR, a checkout that holds models_mae.py"
    if arguments.min_ratio and len(arguments.impl) == 1:
        return "--min-ratio needs a peer in --impl"
    return None


def main() -> None:
    arguments = parse()
    console.setup_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with ExitStack() as stack:
            sys.exit(benchmark(Run(arguments, stack), arguments))
    except (UnusableError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def benchmark(run: Run, arguments: argparse.Namespace) -> int:
    """All stages; the exit status."""
    run.describe()
    if not run.check():
        run.write("refused: implementations disagree")
        return 1
    run.measure()
    run.report["rows"] = step_report.summarise(run.report, arguments)
    run.write("complete")
    step_report.show(run.report, arguments)
    return step_report.verdict(run.report, arguments.min_ratio)


if __name__ == "__main__":
    main()
