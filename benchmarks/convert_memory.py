"""Peak memory of converting a ViT-H/14 autoencoder (657 M parameters), against the file's size.

    python benchmarks/convert_memory.py [--out benchmarks/results/convert_memory.json]

Writes 2.6 GB files to a temporary folder. Rows from .pth need torch, and are left out without it.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mae_jax.convert import weights
from mae_jax.convert.model_info import DEFAULTS, ModelInfo, expected_shapes
from mae_jax.models.variants import VARIANTS

WAYS = [("mae_jax", "hf"), ("hf", "mae_jax"), ("mae_jax", "timm")]
TORCH_WAYS = [("mae_jax", "official"), ("official", "mae_jax"), ("official", "hf")]


def write_source(path: Path) -> None:
    """ViT-H/14 with its decoder, random weights, in our single-file form."""
    size = vars(VARIANTS["vit_h14"])
    facts = dict(source="mae_jax", mlp_ratio=4.0, image_size=(224, 224), channels=3)
    info = ModelInfo(**facts, **size, **DEFAULTS["mae_jax"])
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in expected_shapes(info).items()
    }
    weights.write(weights.Weights(arrays, info), path, "mae_jax")


def name_of(dialect: str) -> str:
    return {"official": "official.pth", "hf": "hf"}.get(dialect, f"{dialect}.safetensors")


def measure(folder: Path, source: str, to: str) -> dict[str, object]:
    """One conversion in a process of its own."""
    begin = time.perf_counter()
    paths = [str(folder / name_of(dialect)) for dialect in (source, to)]
    command = [sys.executable, "-m", "mae_jax.convert", *paths, "--to", to, "--overwrite"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, command
    size = os.path.getsize(folder / name_of("mae_jax"))
    return {
        "from": name_of(source),
        "to": name_of(to),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "peak_over_file": round(usage.ru_maxrss * 1024 / size, 2),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of converting ViT-H/14.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    ways = WAYS + (TORCH_WAYS if importlib.util.find_spec("torch") else [])
    with tempfile.TemporaryDirectory() as name:
        # In a process of its own, since a child's peak begins with what its parent holds.
        code = f"import runpy; runpy.run_path({__file__!r})['write_source'](__import__('pathlib')"
        code += f".Path({str(Path(name) / name_of('mae_jax'))!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        rows = [measure(Path(name), *way) for way in ways]
    for row in rows:
        print("  ".join(f"{value!s:22}" for value in row.values()))
    if arguments.out:
        result = {"python": platform.python_version(), "machine": platform.machine(), "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
