"""Train step and encoder throughput side by side with PyTorch implementations.

    python -m benchmarks.step --task train --size vit_b16 --batch 256 --dtype bf16 \
        --impl mae_jax,hf,hf_compile --json out.json

Every implementation runs in a process of its own; only one computes at a time. mae_jax creates
random weights, images and masks for all. Before timing, losses, gradients and one AdamW step are
compared (encoding: the tokens); implementations that do unequal work are not timed. Rounds are
interleaved (A B C, C B A, ...): in each, every implementation runs a burst of steps. A ratio is the
peer's time over that of mae_jax in the same round, so above 1 mae_jax is faster; median, minimum
and maximum are over the rounds.

Only the model is timed: images are on the device already, as bytes for mae_jax and normalized for
the peers. The mae_jax step also computes the gradient norm and skips NaN/Inf updates, as train.py
does; peers do neither. FLOPs are those of the paper's form for all implementations; "MFU" is
relative to the vendor's bfloat16 peak. Memory is that of the device, on a CPU of the process.
"first s" is the first step including compilation.

Exit code 1: implementations disagree, a worker died or --min-ratio was missed. 2: bad flags or
missing packages.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import interleaved, parity, step_report
from benchmarks.environment import environment, gpus
from benchmarks.rpc import UnusableError, Worker, WorkerError
from benchmarks.step_report import IMAGE_SIZE, OURS
from mae_jax.models.variants import VARIANTS
from mae_jax.utils.atomic import write_json
from mae_jax.utils.cli import make_parser, path_argument, positive_float, positive_int, run_command

log = logging.getLogger("mae_jax")

PEERS = ("hf", "hf_compile", "timm", "timm_compile", "official", "official_compile")
# The paper's AdamW except for eps (1e-8 there): gradients of large models are small relative to
# that, and the first update would depend on their rounding. Only the first step has a large rate.
RECIPE = dict(first_rate=1e-3, rate=1e-6, b1=0.9, b2=0.95, eps=1e-12, weight_decay=0.05)
# Threads of torch stop spinning early: on a busy machine, training ViT-S in bfloat16 takes 4 times
# the CPU time without.
PEER_ENVIRONMENT = {"GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
STATS = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
MAX_WARM_UP, MAX_WARM_UP_CPU = 20, 5  # bursts


def library(name: str) -> str:
    """Return the library of a peer, without "_compile"."""
    return name.removesuffix("_compile")


class Run:
    """The workers, and a JSON report that is updated after every stage."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack):
        self._args = args
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.names: list[str] = args.impl
        plan = self.folder / "plan.json"
        plan.write_text(json.dumps(make_plan(args, self.folder)))
        self.workers: dict[str, Worker] = {}
        for name in self.names:
            self.workers[name] = self._start(name, plan)
            stack.callback(self.workers[name].close)
        self.report: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks.step", *sys.argv[1:]]),
            "status": "started",
            "flags": json.loads(json.dumps(vars(args), default=str)),
            "recipe": RECIPE,
            "peers_environment": PEER_ENVIRONMENT,
            "environment": environment(),
        }

    def _start(self, name: str, plan: Path) -> Worker:
        args = self._args
        command = ["benchmarks.jax_worker", str(plan)]
        variables = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_FLAGS": args.xla_flags}
        if name != OURS:
            command = ["benchmarks.torch_worker", name, str(plan)]
            variables = {"HF_HUB_OFFLINE": "1"} | PEER_ENVIRONMENT
        return Worker(
            name,
            command,
            interpreter=str(for_library(args.python, name) or sys.executable),
            path=for_library(args.path, name),
            environment=variables,
            log=self.folder / f"{name}.log",
        )

    def stage(self, status: str) -> None:
        """Log the next stage, and write the report so far."""
        log.info("%s", status)
        self.write(status)

    def write(self, status: str) -> None:
        self.report["status"] = status
        if self._args.json:
            write_json(self._args.json, self.report)

    def describe(self) -> None:
        """Collect devices and versions; raise UnusableError unless all are CPUs or all are not."""
        self.stage("starting the workers")
        infos = {name: worker.call("describe") for name, worker in self.workers.items()}
        self.report["workers"] = infos
        for name, info in infos.items():
            if (info["platform"] == "cpu") != (infos[OURS]["platform"] == "cpu"):
                raise UnusableError(
                    f"{name} runs on {info['device']}, but {OURS} on {infos[OURS]['device']}: "
                    "install jax[cuda12] or a CUDA build of torch, or set JAX_PLATFORMS=cpu and "
                    "CUDA_VISIBLE_DEVICES="
                )

    def check_parity(self) -> bool:
        """Run the first steps; return False and print the differences if the work is not equal."""
        self.report["checks"] = checks = {}
        self.report["differences"] = differences = {}
        for name, worker in self.workers.items():
            self.stage(f"{name}: compiling, first steps")
            checks[name] = worker.call("check")
        for name in self.names[1:]:
            compared = self.workers[OURS].call("compare", name=name)
            checks[name] |= compared
            mismatches = parity.find_mismatches(
                self._args.dtype, checks[OURS], checks[name], compared
            )
            differences |= {name: mismatches} if mismatches else {}
        for name, lines in differences.items():
            for line in lines:
                print(f"{name} does not do the same work as {OURS}: {line}", file=sys.stderr)
        return not differences

    def measure(self) -> None:
        """Run warm-up and interleaved rounds; raw timings are written after every round."""
        self.report["warm_up"] = {name: self._warm_up(name) for name in self.names}
        steps = {name: bursts[-1]["steps"] for name, bursts in self.report["warm_up"].items()}
        self.report["rounds"] = rounds = []
        start, count = time.monotonic(), self._args.rounds
        for number, order in enumerate(interleaved.round_orders(self.names, count)):
            left = (time.monotonic() - start) / number * (count - number) if number else None
            eta = "" if left is None else f", {left:.0f} s left"
            self.stage(f"round {number + 1} of {count}{eta}")
            rounds.append({name: self._burst(name, int(steps[name])) for name in order})
        self.report["gpus_after"] = gpus()
        for name, worker in self.workers.items():
            self.report["checks"][name]["last_loss"] = worker.call("finish")["loss"]

    def _warm_up(self, name: str) -> list[dict[str, float]]:
        """Run bursts of --burst-seconds until three in a row take the same time."""
        self.stage(f"{name}: warming up")
        on_cpu = self.report["workers"][OURS]["platform"] == "cpu"
        limit = MAX_WARM_UP_CPU if on_cpu else MAX_WARM_UP
        bursts, steps = [self._burst(name, 1)], 1
        while len(bursts) <= limit and not interleaved.is_steady(bursts[1:]):
            if len(bursts) < 3:  # the first burst alone does not predict the speed
                steps = max(1, round(self._args.burst_seconds / interleaved.per_step(bursts[-1])))
            bursts.append(self._burst(name, steps))
        return bursts

    def _burst(self, name: str, steps: int) -> dict[str, float]:
        return self.workers[name].call("burst", steps=steps)


def for_library(paths: dict[str, Path], name: str) -> Path | None:
    """Return the path that was given for an implementation or for its library."""
    return paths.get(name) or paths.get(library(name))


def make_plan(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the JSON that the workers read."""
    names = ("task", "size", "batch", "dtype", "remat", "scan_unroll", "attention", "compile_mode")
    return {
        **{name: vars(args)[name] for name in names},
        **RECIPE,
        **STATS,
        "image_size": IMAGE_SIZE,
        "patches": step_report.num_patches(args.size),
        "peers": {name: library(name) for name in args.impl if name != OURS},
        "official_repo": str(args.official_repo),
        "folder": str(folder),
    }


def implementations(text: str) -> list[str]:
    """Parse names, mae_jax first."""
    names = text.split(",")
    for name in names:
        if name not in (OURS, *PEERS):
            known = ", ".join((OURS, *PEERS))
            raise argparse.ArgumentTypeError(f"{name!r} is none of {known}")
    if OURS not in names or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} must include {OURS}, and each name once")
    return [OURS, *(name for name in names if name != OURS)]


def named_path(text: str) -> tuple[str, Path]:
    """Parse "timm=FOLDER"."""
    name, equals, path = text.partition("=")
    if not equals or name not in (OURS, *PEERS):
        raise argparse.ArgumentTypeError(f"{text!r} is not IMPL=PATH")
    if not path_argument(path).exists():
        raise argparse.ArgumentTypeError(f"{path} does not exist")
    return name, path_argument(path).absolute()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = make_parser("benchmarks.step", __doc__)
    add: Callable[..., Any] = parser.add_argument
    add("--task", choices=("train", "encode"), default="train")
    add("--size", choices=VARIANTS, default="vit_b16")
    add("--batch", type=positive_int, default=8, help="images (8)")
    add("--dtype", choices=("f32", "bf16"), default="bf16", help="of activations (bf16)")
    add("--impl", type=implementations, default=[OURS, "hf"], help=f"of {OURS}, {', '.join(PEERS)}")
    add(
        "--official-repo",
        type=path_argument,
        metavar="DIR",
        help="checkout of facebookresearch/mae",
    )
    for flag, what in (("--python", "Python executable"), ("--path", "first folder of sys.path")):
        text = f"{what} of an implementation; may be repeated"
        add(flag, type=named_path, action="append", default=[], metavar="IMPL=PATH", help=text)
    add("--rounds", type=positive_int, default=10)
    add("--burst-seconds", type=positive_float, default=2.0)
    add("--remat", choices=("none", "dots", "full"), default="none", help="of mae_jax (none)")
    add("--scan-unroll", type=positive_int, help="blocks per iteration, of mae_jax (as train.py)")
    add("--attention", choices=("auto", "xla", "cudnn"), default="auto", help="of mae_jax (auto)")
    add("--xla-flags", default=os.environ.get("XLA_FLAGS", ""), help="XLA_FLAGS of mae_jax")
    add("--compile-mode", default="default", help="of torch.compile (default)")
    add("--min-ratio", type=positive_float, help="fail below this median ratio to any peer")
    add("--json", type=path_argument, help="output file")
    args = parser.parse_args(argv)
    args.python, args.path = dict(args.python), dict(args.path)
    if reason := invalid_combination(args):
        parser.error(reason)
    return args


def invalid_combination(args: argparse.Namespace) -> str | None:
    """Return why flags cannot be combined, or None."""
    libraries = {library(name) for name in args.impl}
    if args.task == "train" and "timm" in libraries:
        return "--impl timm has no masked autoencoder: it is for --task encode"
    if "official" in libraries:
        if args.task == "encode":
            return "--impl official is for --task train: its encoder is timm's"
        if not args.official_repo or not (args.official_repo / "models_mae.py").is_file():
            return "--impl official needs --official-repo DIR, a checkout with models_mae.py"
    if args.min_ratio and len(args.impl) == 1:
        return "--min-ratio needs a peer in --impl"
    return None


def benchmark(run: Run, args: argparse.Namespace) -> int:
    """Run all stages; return the exit code."""
    run.describe()
    if not run.check_parity():
        run.write("refused: implementations disagree")
        return 1
    run.measure()
    run.report["rows"] = step_report.summarize(run.report, args)
    run.write("complete")
    step_report.print_tables(run.report, args)
    return step_report.exit_code(run.report, args.min_ratio)


def main(argv: list[str]) -> None:
    args = parse(argv)
    try:
        with ExitStack() as stack:
            sys.exit(benchmark(Run(args, stack), args))
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
