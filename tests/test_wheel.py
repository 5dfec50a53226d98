"""The wheel and the sdist: complete, and able to train where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from image_helpers import encoded, noise_image

import mae_jax
from mae_jax.distributed.checkpoint_reader import load_run_checkpoint

ROOT = Path(__file__).parent.parent
TINY = [
    "--config.model.image_size=16,16",
    "--config.model.patch=8",
    *(f"--config.model.{key}=8" for key in ("width", "decoder_width")),
    *(f"--config.model.{key}=1" for key in ("depth", "heads", "decoder_depth", "decoder_heads")),
    "--config.model.dtype=float32",
    "--config.batch_size=4",
    "--config.steps=5",
    "--config.optim.warmup_steps=1",
    "--config.data.workers=0",
    "--config.eval.pictures_every_epochs=-1",
]


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Build the sdist of the checkout, and the wheel from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory):
    """Return the bin/ of a venv with the wheel, and the present environment's other packages."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=venv)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "present.pth").write_text(sysconfig.get_path("purelib"))
    return venv / "bin"


def test_the_sdist_and_the_wheel_are_complete(dist):
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    version = mae_jax.__version__
    with tarfile.open(sdist) as archive:
        sources = {name.removeprefix(f"mae_jax-{version}/") for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive:
        packaged = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "mae_jax").rglob("*.py")}
    recipes = {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert modules | recipes | {"train.py", "README.md", "LICENSE", "pyproject.toml"} <= sources
    assert {name for name in packaged if name.endswith(".py")} == modules | {
        f"mae_jax/{name}" for name in recipes
    }


def test_the_wheel_trains_a_recipe_and_reads_a_copy_of_one(installed, tmp_path):
    """Paths start with the home directory, whose name and whose folders have brackets."""
    home = tmp_path / "home[1]"
    images = home / "images[2]"
    images.mkdir(parents=True)
    for number in range(8):
        (images / f"{number}.png").write_bytes(encoded(noise_image(number, (20, 20)), "PNG"))
    data = ["--config.data.source=folder", "--config.data.path=~/images[2]"]
    flags = ["--workdir=~/lr[1e-4]", "--config", "pretrain:vit_ti16", *data, *TINY]
    run(installed / "mae-jax", "train", *flags, cwd=tmp_path, HOME=str(home))
    assert load_run_checkpoint(home / "lr[1e-4]" / "checkpoints")[0] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["home[1]"]

    (tmp_path / "mine.py").write_text((ROOT / "configs" / "scratch.py").read_text())
    code = "import mae_jax, mine; print(mae_jax.__file__, mine.get_config().model.width)"
    module, width = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert Path(module).is_relative_to(installed.parent)
    assert width == "768"
