import os
import subprocess
import sys

import pytest

from mae_jax.train.workdir import WorkdirError, lock_workdir


def test_a_workdir_in_use_is_refused_with_the_owner(tmp_path):
    code = (
        "import sys, pathlib; from mae_jax.train.workdir import *\n"
        "try:\n"
        "  with lock_workdir(pathlib.Path(sys.argv[1])): print('free')\n"
        "except WorkdirError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with lock_workdir(tmp_path):
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"in use by process {os.getpid()} on" in out
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "free\n"


@pytest.mark.parametrize("place", ["/proc/mae_jax/run", "file/run"])
def test_a_workdir_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="cannot write to the workdir"):
        lock_workdir(tmp_path / place).__enter__()
