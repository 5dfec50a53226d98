"""Import layering: a module imports only from lower layers; some packages stay in one place."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [  # a module may import its own folder and those on lower layers
    ["utils"],
    ["distributed"],
    ["models", "data"],
    ["tasks"],
    ["convert"],
    ["evaluate"],
    ["train", "features", "predict", "reconstruct"],
]
FENCES = {  # package -> the only places that may import it
    "flax": ["models/"],
    "orbax": ["distributed/checkpointer.py", "distributed/checkpoint_reader.py"],
    "matplotlib": ["train/compare.py"],
    "pyarrow": ["data/tables.py"],
    "pydicom": ["data/dicom.py"],
    "grain": ["data/loader.py", "data/worker_processes.py"],
    "tensorflow_datasets": ["data/tfds.py", "data/demo_dataset.py", "data/downscale.py"],
    "tensorboardX": ["train/loggers.py"],
    "wandb": ["train/loggers.py"],
    "mlflow": ["train/loggers.py"],
    "rich": ["train/progress.py", "utils/console.py"],
    "safetensors": ["convert/io.py", "convert/weight_files.py"],
    "ml_collections": [
        "train/__main__.py",
        "train/config.py",
        "train/config_schema.py",
        "train/overrides.py",
        "train/recipes.py",
    ],
    "huggingface_hub": ["convert/hub.py"],
    "fsspec": ["utils/remote.py"],
    "tenacity": ["utils/remote.py"],
    "tensorflow": [],
    "torch": ["convert/torch_io.py"],
    "jax2onnx": ["convert/onnx_io.py"],
    "onnx": ["convert/onnx_io.py"],
}
FILES = sorted((ROOT / "mae_jax").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Return all that a file imports, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def package_of(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def layer(package: str) -> int:
    return next(number for number, packages in enumerate(LAYERS) if package in packages)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_import_only_from_lower_layers(path):
    inside = path.relative_to(ROOT / "mae_jax")
    here = inside.parts[0].removesuffix(".py")
    entry_point = here == "__init__" or inside.name == "__main__.py"
    for module in imports(path):
        top = module.split(".")[0]
        if top == "mae_jax" and package_of(module) not in ("", "__version__", here):
            lower = entry_point or layer(package_of(module)) < layer(here)
            assert lower, f"{inside} imports {module}"
        assert top not in ("configs", "train"), f"{inside} imports {module}"
        if top in FENCES:
            allowed = any(str(inside).startswith(place) for place in FENCES[top])
            assert allowed, f"{inside} imports {top}"
    if here == "data":
        assert "jax" not in {module.split(".")[0] for module in imports(path)}


def test_no_import_cycles():
    names = {path: dotted(path) for path in FILES}
    edges = {name: imports(path) & set(names.values()) - {name} for path, name in names.items()}
    while leaves := {name for name, below in edges.items() if not below}:
        edges = {name: below - leaves for name, below in edges.items() if name not in leaves}
    assert edges == {}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_every_package_has_a_layer_and_there_are_few():
    packages = {path.relative_to(ROOT / "mae_jax").parts[0].removesuffix(".py") for path in FILES}
    assert packages - {"__init__"} == {name for packages in LAYERS for name in packages}
    assert len(packages) <= 12
    assert len(LAYERS) <= 8


def test_importing_the_package_is_light():
    code = "import sys, mae_jax; sys.exit(bool({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
