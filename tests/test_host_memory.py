"""Tests of mae_jax.utils.host_memory, in processes of their own: the settings are global."""

import os
import subprocess
import sys

import pytest

# Temporary memory of 64 MiB: 16,384 page faults, without huge pages, if it is allocated anew.
COMPUTE = """
import resource
import jax, jax.numpy as jnp
from mae_jax.utils.host_memory import keep_freed_memory_on_cpu

kept = keep_freed_memory_on_cpu()
compute = jax.jit(lambda x: jnp.linalg.norm((y := x @ x.T) - y.mean(0)))
x = jnp.ones((4096, 8))
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = []
for _ in range(8 if kept else 0):
    before = count()
    compute(x).block_until_ready()
    faults.append(count() - before)
print(kept, min(faults[2:], default=0))
"""


def run(**variables: str) -> tuple[bool, int]:
    """Return whether freed memory is kept, and the fewest page faults of a repeated computation.

    The fewest, since other threads may take a piece of the freed memory once in a while.
    """
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", *variables)}
    command = [sys.executable, "-c", COMPUTE]
    environment = inherited | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


def test_temporary_memory_is_reused():
    kept, faults = run()
    assert kept
    assert faults < 1000


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_ARENA_MAX", "4"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")],
)
def test_settings_in_the_environment_are_left_alone(name, value):
    kept, _ = run(**{name: value})
    assert not kept
