"""Runs that the fault tolerance tests compare with."""

import pytest
from run_helpers import run, write_tiny


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("images"), evaluate_every_epochs=-1.0)


@pytest.fixture(scope="session")
def straight(tiny, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("straight")
    run(tiny, workdir, "--config.log.every_steps=1")
    return workdir
