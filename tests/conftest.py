"""Test weather: 4 virtual CPU devices, exact matmuls, shape annotations enforced."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "allow")

_hook = jaxtyping.install_import_hook(["mae_jax.models", "mae_jax.tasks"], "beartype.beartype")
_hook.__enter__()


@pytest.fixture(scope="session")
def golden():
    """The folder of reference arrays."""
    from pathlib import Path

    return Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def photo_crops(tmp_path_factory):
    """Where the embedded data set is prepared."""
    from mae_jax.data.sources import TfdsSource

    folder = str(tmp_path_factory.mktemp("datasets"))
    TfdsSource("photo_crops", "train", folder)
    return folder
