"""The plan of the house: imports go down only, and some packages stay in their room."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = [  # a module may import its own folder and what stands on a lower floor
    ["sizes", "trees", "whole", "console"],
    ["flops", "distributed", "digests", "attention", "xla"],
    ["checkpoint_reader", "attention_choice"],
    ["data", "pixels", "models", "optim", "sharding", "checkpoint", "metrics", "workdir"],
    ["tasks", "convert"],
    ["training", "health", "feed", "pretrained", "warm_start"],
    ["evals"],
    ["evaluation"],
    ["recipe"],
    ["start"],
    ["parts"],
    ["loop"],
    ["experiment", "command_line"],
    ["reconstruct", "features", "predict", "evaluate"],
]
DOORS = [
    "__init__.py",
    "convert/__main__.py",
    "data/__main__.py",
]  # as high as the commands, wherever they lie
FENCES = {  # package -> where alone it may be imported
    "flax": ["models/"],
    "orbax": ["checkpoint.py", "checkpoint_reader.py"],
    "grain": ["data/loader.py", "data/workers.py"],
    "tensorflow_datasets": ["data/tfds_source.py", "data/embedded.py", "data/cache.py"],
    "tensorboardX": ["metrics.py"],
    "rich": ["metrics.py", "console.py"],
    "safetensors": ["convert/files.py"],
    "ml_collections": [],
    "tensorflow": [],
    "torch": ["convert/torch_io.py"],
}
FILES = sorted((ROOT / "mae_jax").rglob("*.py"))


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if module.count(".") else ""


def floor(name: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if name in rooms)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path):
    inside = path.relative_to(ROOT / "mae_jax")
    here = inside.parts[0].removesuffix(".py")
    height = len(FLOORS) if str(inside) in DOORS else floor(here)
    for module in imports(path):
        package = module.split(".")[0]
        if package == "mae_jax" and room(module) not in ("", "__version__", here):
            assert floor(room(module)) < height, f"{inside} imports {module}"
        assert package not in ("configs", "train"), f"{inside} imports {module}"
        if package in FENCES:
            allowed = any(str(inside).startswith(place) for place in FENCES[package])
            assert allowed, f"{inside} imports {package}"
    if here == "data":
        assert "jax" not in {module.split(".")[0] for module in imports(path)}


def test_every_room_has_a_floor():
    rooms = {path.relative_to(ROOT / "mae_jax").parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} == {name for rooms in FLOORS for name in rooms}


def test_the_map_in_the_readme_has_every_module():
    page = (ROOT / "README.md").read_text()
    listed = page.partition("## Where things are")[2].partition("```\n")[2].partition("```")[0]
    names = {word for word in listed.split() if word.endswith(".py")}
    modules = {str(path.relative_to(ROOT / "mae_jax")) for path in FILES if path.stem != "__init__"}
    assert modules - names == set()
    folders = [ROOT / name for name in ("mae_jax", ".", "configs", "benchmarks")]
    assert [name for name in names if not any((f / name).exists() for f in folders)] == []


def test_importing_the_package_is_light():
    import subprocess

    code = "import sys, mae_jax; sys.exit(bool({'jax', 'flax', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
