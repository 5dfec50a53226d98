"""Sweep of `benchmarks.step` on one GPU: comparisons with PyTorch, variants and XLA flags.

    python -m benchmarks.gpu_sweep --json sweep.json [--only 'b-*'] [--list] [-- STEP FLAGS]

Every row is a run of `benchmarks.step`; what follows `--` is added to all of them, as in
`-- --path timm=DIR`, or `-- --size vit_ti16 --batch 2` for a trial. The JSON is written after every
row, and the same command resumes: rows in it with the same flags are skipped unless they failed.
Rows run minutes apart: the difference between b-base and b-base-again is the noise.
"""

import fnmatch
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, environment
from mae_jax.utils.atomic import write_json
from mae_jax.utils.cli import make_parser, path_argument, run_command
from mae_jax.utils.console import print_table
from mae_jax.utils.errors import UserError

SIZES = {"b": ("vit_b16", 256), "l": ("vit_l16", 128), "h": ("vit_h14", 64)}  # and batch size
COMMAND_BUFFERS = "--xla_gpu_enable_command_buffer="
LOOPS = f"{COMMAND_BUFFERS}FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE,CONDITIONAL"
XLA_FLAGS = [  # candidates that are off by default, or on and maybe harmful; train.py sets none
    "--xla_gpu_enable_triton_gemm=false",
    "--xla_gpu_enable_cublaslt=true",
    "--xla_gpu_cudnn_gemm_fusion_level=2",
    "--xla_gpu_exhaustive_tiling_search=true",
    LOOPS,  # a loop over blocks is launched once, not per iteration
    f"{LOOPS} --xla_gpu_command_buffer_unroll_loops=true",
    "--xla_gpu_graph_min_graph_size=1",
    COMMAND_BUFFERS,  # none
    "--xla_gpu_enable_dynamic_slice_fusion=true",  # read stacked parameters without a copy
    "--xla_gpu_enable_cudnn_layer_norm=true",
    "--xla_gpu_experimental_enable_fusion_autotuner=true",
    "--xla_gpu_experimental_enable_triton_warp_specialization=true",
    "--xla_gpu_enable_triton_hopper=true",
    "--xla_gpu_experimental_enable_triton_tma=true",
]


def rows() -> dict[str, list[str]]:
    """Return the flags of `benchmarks.step` by row, most informative first."""
    result = {}
    for letter, (size, batch) in SIZES.items():
        base = [f"--size={size}", f"--batch={batch}", "--rounds=6", "--burst-seconds=1"]
        result[f"{letter}-peers"] = [*base, "--impl=mae_jax,hf,hf_compile"]
        encode = "--impl=mae_jax,timm,timm_compile,hf,hf_compile"
        result[f"{letter}-encode"] = [*base, "--task=encode", encode]
        base.append("--impl=mae_jax")
        result[f"{letter}-base"] = base
        result[f"{letter}-loop"] = [*base, "--scan-unroll=1"]
        for attention in ("cudnn", "xla"):
            result[f"{letter}-{attention}"] = [*base, f"--attention={attention}"]
        result[f"{letter}-batch"] = [*base, f"--batch={2 * batch}"]
        result[f"{letter}-remat"] = [*base, "--remat=dots"]
        result[f"{letter}-base-again"] = base
    for number, flags in enumerate(XLA_FLAGS):
        result[f"b-xla-{number}"] = [*result["b-base"], f"--xla-flags={flags}"]
    return result


def run_row(flags: list[str]) -> dict[str, Any]:
    """Run `benchmarks.step`; return its rows, or the end of its log if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        command = [sys.executable, "-m", "benchmarks.step", *flags, f"--json={path}"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            return {"flags": flags, "error": done.stderr.strip()[-1000:]}
        return {"flags": flags, "rows": json.loads(path.read_text())["rows"]}


def print_results(results: dict[str, Any]) -> None:
    """Print a line for every implementation of every row."""
    cells = [
        (
            name,
            row["implementation"],
            f"{1e3 * row['step_s']['median']:.2f}",
            f"{row['images_per_s']:,.1f}",
            f"{row['mfu_peak']:.1%}" if row["mfu_peak"] else "",
            f"{row['ratio']['median']:.2f}" if "ratio" in row else "",
        )
        for name, result in results.items()
        for row in result.get("rows", [])
    ]
    print_table("GPU sweep", ("row", "", "step ms", "images/s", "MFU", "ratio"), cells)
    for name, result in results.items():
        if "error" in result:
            print(f"{name} failed: {result['error'].splitlines()[-1]}")


def main(argv: list[str]) -> None:
    parser = make_parser("benchmarks.gpu_sweep", __doc__)
    parser.add_argument("--json", type=path_argument, help="results, and where to resume from")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="rows to run (all)")
    parser.add_argument("--list", action="store_true", help="print the rows and exit")
    parser.add_argument("step_flags", nargs="*", help="flags of benchmarks.step, after --")
    args = parser.parse_args(argv)
    chosen = {name: flags for name, flags in rows().items() if fnmatch.fnmatch(name, args.only)}
    if not chosen:
        raise UserError(f"--only {args.only} matches none of {', '.join(rows())}")
    if args.list:
        print("\n".join(f"{name}: {' '.join(flags)}" for name, flags in chosen.items()))
        return
    if not args.json:
        raise UserError("--json is missing")
    report = {"environment": environment(), "results": {}}
    if args.json.exists():
        report["results"] = json.loads(args.json.read_text())["results"]
    for name, flags in chosen.items():
        flags, previous = [*flags, *args.step_flags], report["results"].get(name, {})
        if previous.get("flags") == flags and "error" not in previous:
            continue
        print(name, file=sys.stderr, flush=True)
        report["results"][name] = run_row(flags)
        write_json(args.json, report)
    print_results(report["results"])
    if any("error" in result for result in report["results"].values()):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
