"""Execute docs/notebooks/visualize.ipynb: any error in a cell is an error here.

    python scripts/run_notebook.py                    # check it, on a demo of 40 steps
    python scripts/run_notebook.py --demo runs/demo   # and write its outputs, of a complete demo

It runs in a temporary folder, with the demo's workdir in runs/demo as the notebook expects.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "notebooks" / "visualize.ipynb"
SHORT = ("--config.steps=40", "--config.optim.warmup_steps=10", "--config.eval.baselines=False")
QUIET = ("--config.eval.linear=False", "--config.eval.knn_every_epochs=-1")


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute the notebook of the documentation.")
    parser.add_argument("--demo", type=Path, help="workdir of a complete run of the demo")
    demo = parser.parse_args().demo
    with TemporaryDirectory() as folder:
        workdir = Path(folder, "runs", "demo")
        workdir.parent.mkdir()
        if demo is None:
            train_briefly(workdir)
        else:
            workdir.symlink_to(demo.resolve())
        notebook = execute(Path(folder))
    if demo is not None:
        nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.relative_to(ROOT)}: {len(notebook.cells)} cells")


def train_briefly(workdir: Path) -> None:
    """Train the demo for some steps, on the dataset of `make demo`."""
    command = [sys.executable, "train.py", "--config", "configs/demo.py", "--workdir", str(workdir)]
    subprocess.run([*command, *SHORT, *QUIET], cwd=ROOT, check=True)


def execute(folder: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of its cells, executed in a folder.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an error; has its traceback.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times, which would change every time
    return notebook


if __name__ == "__main__":
    main()
