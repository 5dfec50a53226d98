"""Everything that is measured on one GPU, in one go, the most telling first.

    python -m benchmarks.gpu_suite --out DIR [--minutes 20] [--only NAME,...] [--fresh]

Each row is a process of `benchmarks.step`, `benchmarks.kernels` or `benchmarks.profile`, whose log
and JSON lie in DIR. DIR/suite.json is written anew after every row, so a run that is cut keeps what
it has; the same command goes on with the rows that are missing or failed. Rows that do not fit the
time left, by estimates that learn from the rows that are done, are left out and listed.

Variants of our step are rows of their own, minutes apart: "b-base-again" tells what differences
mean. Ratios to peers come from rounds in which both take turns.

Without a GPU it refuses, unless --tiny asks for the same rows on a CPU, at sizes that say nothing.
Exits with 1 where a row failed, with 2 where nothing can be run.
"""

import argparse
import fnmatch
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import suite_report
from benchmarks.suite_run import Row, Suite
from mae_jax.models.variants import VARIANTS
from mae_jax.utils import console

# XLA flags of NVIDIA GPUs to try on our step of ViT-B: name, flags, why it may help. None is set
# anywhere else. What is on by default already (Triton's products, autotuning at level 4, falling
# back to cuBLAS) is tried only where switching it off might help.
CANDIDATES = {
    "gemm-no-triton": (
        "--xla_gpu_enable_triton_gemm=false",
        "products by cuBLAS only, as older recipes for NVIDIA GPUs have it",
    ),
    "gemm-cublaslt": (
        "--xla_gpu_enable_cublaslt=true",
        "biases and activations in the products' epilogues",
    ),
    "gemm-cudnn": (
        "--xla_gpu_cudnn_gemm_fusion_level=2",
        "products with their neighbours as one kernel of cuDNN",
    ),
    "gemm-tilings": (
        "--xla_gpu_exhaustive_tiling_search=true",
        "more tilings of Triton's products are tried; compiling takes longer",
    ),
    "buffer-while": (
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL",
        "the loop over blocks is launched once, and not by the host in every iteration",
    ),
    "buffer-unrolled": (
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL"
        " --xla_gpu_command_buffer_unroll_loops=true",
        "the same, and all iterations as one sequence",
    ),
    "buffer-small": (
        "--xla_gpu_graph_min_graph_size=1",
        "short sequences of kernels too are launched as one",
    ),
    "buffer-none": (
        "--xla_gpu_enable_command_buffer=",
        "every kernel launched alone: what command buffers are worth",
    ),
    "slice-fusion": (
        "--xla_gpu_enable_dynamic_slice_fusion=true",
        "blocks read their slices of the stacked parameters without a copy",
    ),
    "layer-norm": (
        "--xla_gpu_enable_cudnn_layer_norm=true",
        "layer norms by cuDNN",
    ),
    "fusion-tuner": (
        "--xla_gpu_experimental_enable_fusion_autotuner=true",
        "fused elementwise work is tuned as products are",
    ),
    "gemm-warps": (
        "--xla_gpu_experimental_enable_triton_warp_specialization=true",
        "in Triton's products some warps load while others multiply",
    ),
    "gemm-hopper": (
        "--xla_gpu_enable_triton_hopper=true",
        "Triton's products with the tensor cores of Hopper",
    ),
    "gemm-tma": (
        "--xla_gpu_experimental_enable_triton_tma=true",
        "Triton's products read by the tensor memory accelerator",
    ),
}

LETTERS = {"b": "vit_b16", "l": "vit_l16", "h": "vit_h14"}
BATCHES = {"b": 256, "l": 128, "h": 64}  # of training
MOST_UNROLLED = 24  # blocks; more take minutes to compile
TINY = {
    "benchmarks.kernels": {"size": "vit_ti16", "batch": 2, "image-size": 32, "seconds": 0.002},
    "benchmarks.profile": {"size": "vit_ti16", "batch": 2, "image-size": 32, "steps": 2},
    "benchmarks.step": {"size": "vit_ti16", "batch": 2, "rounds": 1, "burst-seconds": 0.01},
}
ON_CPU = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
PROBE = "import jax; device = jax.devices()[0]; print(device.platform, device.device_kind)"


def rows(*, tiny: bool) -> list[Row]:
    """All of them, in the order of their worth: 20 minutes reach to some of the flags."""
    found = [_against_peers("b", 140), _profile("b", 60), *_sweep_of_b()]
    found += [
        _against_peers("l", 180),
        _against_peers("h", 230),
        _encoding("b", 110),
        _kernels("b"),
    ]
    found += [*_flags(), _profile("l", 80), _encoding("l", 140), _float32(), *_sweeps_of_larger()]
    found += [_kernels("l"), _kernels("h"), _profile_apart(), _tuned_peer()]
    return [_tiny(row) for row in found] if tiny else found


def _tiny(row: Row) -> Row:
    flags = row.flags | TINY[row.module]
    if "scan-unroll" in flags:
        flags["scan-unroll"] = VARIANTS["vit_ti16"].depth
    return Row(row.name, row.module, flags, row.estimate, row.why)


def _kernels(letter: str) -> Row:
    flags = {"size": LETTERS[letter], "batch": BATCHES[letter], "dtype": "bf16"}
    why = "what the products and the attention of a step reach alone"
    return Row(f"kernels-{letter}", "benchmarks.kernels", flags, 80, why)


def _step(name: str, letter: str, seconds: float, why: str, **flags: Any) -> Row:
    """A row of `benchmarks.step`: of mae_jax alone in few rounds, unless flags say more."""
    base = {"task": "train", "size": LETTERS[letter], "batch": BATCHES[letter], "dtype": "bf16"}
    base |= {"impl": "mae_jax", "rounds": 4, "burst-seconds": 1}
    flags = {flag.replace("_", "-"): value for flag, value in flags.items()}
    return Row(name, "benchmarks.step", base | flags, seconds, why)


def _against_peers(letter: str, seconds: float) -> Row:
    why = "training, side by side with transformers, eager and compiled"
    peers = "mae_jax,hf,hf_compile"
    return _step(f"train-{letter}", letter, seconds, why, impl=peers, rounds=6)


def _tuned_peer() -> Row:
    flags = {"impl": "mae_jax,hf_compile", "rounds": 6}
    flags["compile_mode"] = "max-autotune-no-cudagraphs"
    return _step("train-b-tuned", "b", 300, "beside a peer that tunes its kernels", **flags)


def _sweep_of_b() -> Iterator[Row]:
    depth = VARIANTS["vit_b16"].depth
    yield _step("b-base", "b", 40, "what its variants are compared with")
    yield _step("b-unroll", "b", 60, "no loop over blocks", scan_unroll=depth)
    for kind in ("cudnn", "xla"):
        yield _step(f"b-{kind}", "b", 40, f"attention by {kind}", attention=kind)
    yield _step("b-batch-512", "b", 40, "512 images", batch=512)
    yield _step("b-remat-dots", "b", 40, "all but products computed twice", remat="dots")
    yield _step("b-base-again", "b", 40, "how much the same differs after some minutes")


def _profile(letter: str, seconds: float) -> Row:
    flags = {"size": LETTERS[letter], "batch": BATCHES[letter], "dtype": "bf16"}
    return Row(f"profile-{letter}", "benchmarks.profile", flags, seconds, "where time goes")


def _profile_apart() -> Row:
    flags = _profile("b", 60).flags | {"xla-flags": CANDIDATES["buffer-none"][0]}
    why = "the same without command buffers, in which kernels do not tell their origin"
    return Row("profile-b-apart", "benchmarks.profile", flags, 60, why)


def _sweeps_of_larger() -> Iterator[Row]:
    for letter in ("l", "h"):
        unroll = min(VARIANTS[LETTERS[letter]].depth, MOST_UNROLLED)
        batch = 2 * BATCHES[letter]
        yield _step(f"{letter}-base", letter, 60, "what its variants are compared with")
        yield _step(f"{letter}-unroll", letter, 120, "fewer or no loops", scan_unroll=unroll)
        yield _step(f"{letter}-cudnn", letter, 60, "by cudnn", attention="cudnn")
        yield _step(f"{letter}-batch-{batch}", letter, 60, f"{batch} images", batch=batch)
        yield _step(f"{letter}-remat-dots", letter, 60, "products kept only", remat="dots")


def _encoding(letter: str, seconds: float) -> Row:
    flags = {"task": "encode", "impl": "mae_jax,timm,timm_compile,hf,hf_compile"}
    flags |= {"rounds": 6, "burst_seconds": 0.5}
    return _step(f"encode-{letter}", letter, seconds, "features of whole images", **flags)


def _flags() -> Iterator[Row]:
    for name, (flags, why) in CANDIDATES.items():
        yield _step(f"flag-{name}", "b", 45, why, xla_flags=flags)


def _float32() -> Row:
    flags = {"dtype": "f32", "batch": 64, "impl": "mae_jax,hf"}
    return _step("train-b-f32", "b", 90, "training in float32 throughout", **flags)


def probe(environment: dict[str, str]) -> tuple[str, str]:
    """Platform and kind of the first device, asked of a process, which lets go of it.

    Raises:
      RuntimeError: JAX finds none.
    """
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"JAX does not start here: {suite_report.last_words(done.stderr)}")
    platform, _, kind = done.stdout.splitlines()[-1].partition(" ")
    return platform, kind


def choose(found: list[Row], patterns: str | None) -> list[Row]:
    """Those rows that some pattern names, in their order; ValueError where one names none."""
    if patterns is None:
        return found
    chosen: set[str] = set()
    for pattern in patterns.split(","):
        names = fnmatch.filter([row.name for row in found], pattern)
        if not names:
            known = ", ".join(row.name for row in found)
            raise ValueError(f"--only={pattern}: there is no such row; there are {known}")
        chosen |= set(names)
    return [row for row in found if row.name in chosen]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, help="folder of suite.json, logs and JSON of the rows")
    add("--minutes", type=float, default=20.0, help="after which no row runs any more (20)")
    add("--only", metavar="NAME,...", help='rows to run; "flag-*" are all that begin so')
    add("--fresh", action="store_true", help="forget the rows that --out holds")
    add("--tiny", action="store_true", help="the same rows on a CPU, at sizes that say nothing")
    add("--list", action="store_true", help="print the rows and run none")
    for flag in ("--python", "--path"):
        text = "as in benchmarks.step, for peers that are installed elsewhere; may be repeated"
        add(flag, action="append", default=[], metavar="IMPL=PATH", help=text)
    arguments = parser.parse_args()
    if not 0 < arguments.minutes < float("inf"):
        parser.error(f"--minutes={arguments.minutes} must be above 0")
    if arguments.list:
        return arguments
    if arguments.out is None:
        parser.error("--out is missing: a folder of suite.json, logs and JSON of the rows")
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out={arguments.out} is a file")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Runs what is due and prints it; the exit status.

    Raises:
      ValueError: the flags, or what lies in --out, do not fit.
      RuntimeError: there is no device to run on.
    """
    chosen = choose(rows(tiny=arguments.tiny), arguments.only)
    if arguments.list:
        for row in chosen:
            print(f"{row.name:<20} about {row.estimate:3.0f} s  {row.why}")
        return 0
    environment = _caches(arguments.out) | os.environ | (ON_CPU if arguments.tiny else {})
    platform, device = probe(environment)
    if platform not in ("gpu", "cuda") and not arguments.tiny:
        raise RuntimeError(
            f"JAX finds no GPU but {device}: install jax[cuda12] on a machine with one, or give "
            "--tiny to see the rows run on a CPU"
        )
    beside = [f"--{flag}={value}" for flag in ("python", "path") for value in vars(arguments)[flag]]
    about = {"platform": platform, "device": device, "tiny": arguments.tiny}
    suite = Suite(arguments.out, about, environment, beside, fresh=arguments.fresh)
    try:
        suite.run(chosen, 60 * arguments.minutes)
    finally:
        suite_report.show(suite.report)
    return 1 if any(row["status"] != "done" for row in suite.report["rows"]) else 0


def _caches(folder: Path) -> dict[str, str]:
    """Rows share what is compiled and tuned: the first of a program tells how long that takes."""
    names = ("JAX_COMPILATION_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")
    return {name: str(folder.absolute() / "compiled" / name[:3].lower()) for name in names}


def main() -> None:
    arguments = _parse()
    console.setup_logging()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        sys.exit(run(arguments))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
