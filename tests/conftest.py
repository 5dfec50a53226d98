"""Test environment: 4 virtual CPU devices, fast compilation, runtime shape checks."""

import os
import tempfile

from run_helpers import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes into compilation, and many tests, and the runs that they start, compile the
# same programs: share them among all processes of the session, and do not optimize them (four times
# faster). XLA_FLAGS= in the environment optimizes, as `make test-torch` does.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ.setdefault("XLA_FLAGS", FAST_COMPILATION)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "allow")

# A TrainState also holds shapes or shardings, so the train step is not checked at run time.
CHECKED = ["models", *(f"tasks.{name}" for name in ("masking", "mixup", "pretrain", "classify"))]
_hook = jaxtyping.install_import_hook(
    [f"mae_jax.{name}" for name in CHECKED], "typechecker.typechecked"
)
_hook.__enter__()


@pytest.fixture(scope="session")
def golden():
    """The folder of reference arrays."""
    from pathlib import Path

    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def photo_crops(tmp_path_factory):
    """Return the directory in which the demo dataset is prepared."""
    from mae_jax.data.tfds import TfdsSource

    folder = str(tmp_path_factory.mktemp("datasets"))
    TfdsSource("photo_crops", "train", folder)
    return folder
