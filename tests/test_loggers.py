"""Loggers in threads: resuming, failing, hanging, and what is said about it."""

import json
import sys
import threading

import numpy as np
import pytest

from mae_jax.train import background, loggers, metrics_writer
from mae_jax.train.config import LogConfig
from mae_jax.train.loggers import RunInfo, describe, import_packages
from mae_jax.train.metrics_writer import MetricsWriter
from mae_jax.utils.errors import UserError


class Recorder:
    """A logger that keeps what it gets."""

    purges = False

    def __init__(self, run, step):
        self.run, self.step = run, step
        self.rows, self.pictures, self.closed = [], [], False
        type(self).made.append(self)

    def scalars(self, step, values):
        self.rows.append((step, dict(values)))

    def picture(self, step, name, image):
        self.pictures.append((step, name, image.shape))

    def close(self):
        self.closed = True


@pytest.fixture
def recorder(monkeypatch):
    """A class of recorders, in place of wandb; `made` has its objects."""
    kind = type("WandB", (Recorder,), {"made": []})
    monkeypatch.setitem(loggers.LOGGERS, "wandb", kind)
    return kind


def make_writer(workdir, start_step=0, to=("jsonl", "wandb")):
    run = RunInfo(workdir, name="first", config={"seed": 0})
    return MetricsWriter(
        workdir, start_step=start_step, steps_per_epoch=10, enabled=True, to=to, run=run
    )


def write(writer, steps):
    for step in steps:
        writer.write_scalars(step, {"loss": float(step)})


def steps_of(kind):
    return [step for logger in kind.made for step, _ in logger.rows]


def test_scalars_pictures_and_config(tmp_path, recorder):
    writer = make_writer(tmp_path)
    write(writer, [5])
    writer.write_scalars(5, {"knn_top1": 0.5})
    writer.write_image(5, "reconstruction", np.zeros((2, 3, 3), np.uint8))
    writer.close()
    [logger] = recorder.made
    assert logger.run.config == {"seed": 0}
    assert logger.rows == [(5, {"epoch": 0.5, "loss": 5.0}), (5, {"knn_top1": 0.5})]
    assert logger.pictures == [(5, "reconstruction", (2, 3, 3))]
    assert logger.closed


def test_a_resumed_run_goes_on_without_doubled_steps(tmp_path, recorder):
    writer = make_writer(tmp_path)
    write(writer, [2, 4, 6])
    writer.close()
    writer = make_writer(tmp_path, start_step=4)  # the checkpoint before it was killed
    write(writer, [6, 8])
    writer.close()
    assert steps_of(recorder) == [2, 4, 6, 8]
    first, second = recorder.made
    assert first.run.id == second.run.id


def test_a_logger_added_on_resume_gets_the_steps_before(tmp_path, recorder):
    writer = make_writer(tmp_path, to=("jsonl",))
    write(writer, [2, 4, 6])
    writer.close()
    writer = make_writer(tmp_path, start_step=4)
    write(writer, [6])
    writer.close()
    assert steps_of(recorder) == [2, 4, 6]


def test_tensorboard_purges_what_follows_a_rollback(tmp_path, recorder):
    recorder.purges = True
    writer = make_writer(tmp_path)
    write(writer, [2, 4])
    writer.rewind(2)
    write(writer, [4])
    writer.close()
    assert [logger.step for logger in recorder.made] == [0, 2]
    assert steps_of(recorder) == [2, 4, 4]
    assert not (tmp_path / "loggers").exists()


def test_a_raising_logger_is_reported_once_and_counted(tmp_path, recorder, monkeypatch, caplog):
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh1234")

    def scalars(self, step, values):
        raise SystemExit(f"refused http://me:word@host with abcdefgh1234 at {step}")

    monkeypatch.setattr(recorder, "scalars", scalars, raising=False)
    writer = make_writer(tmp_path)
    write(writer, [1, 2, 3])
    writer.close()
    first, last = caplog.messages
    assert first == (
        "logging to wandb fails (SystemExit: refused http://***@host with *** at 1); training "
        "goes on"
    )
    assert last == "3 rows or pictures were not logged to wandb"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_logger_that_opens_late_gets_all_rows(tmp_path, recorder, monkeypatch, caplog):
    begin, attempts = recorder.__init__, []

    def refuse_twice(self, run, step):
        attempts.append(step)
        if len(attempts) <= 2:
            raise ConnectionError
        begin(self, run, step)

    monkeypatch.setattr(recorder, "__init__", refuse_twice)
    writer = make_writer(tmp_path)
    write(writer, [1, 2, 3])
    writer.close()
    assert steps_of(recorder) == [1, 2, 3]
    assert caplog.messages == ["logging to wandb fails (ConnectionError); training goes on"]


def test_a_hanging_logger_is_left_behind(tmp_path, recorder, monkeypatch, caplog):
    entered, released = threading.Event(), threading.Event()

    def hang(self, step, values):
        entered.set()
        released.wait()
        self.rows.append((step, values))

    monkeypatch.setattr(recorder, "scalars", hang, raising=False)
    monkeypatch.setattr(background, "CAPACITY", 2)
    monkeypatch.setattr(metrics_writer, "CLOSE_TIMEOUT_S", 0.0)
    writer = make_writer(tmp_path)
    write(writer, [1])
    assert entered.wait(60)
    write(writer, range(2, 7))  # two wait, three find the queue full
    writer.close()
    assert [m for m in caplog.messages if "does not keep up" in m] == [caplog.messages[0]]
    assert "rows or pictures were not logged to wandb, which does not answer" in caplog.messages[1]
    released.set()
    [logger] = writer._loggers
    logger._thread.join(60)
    assert steps_of(recorder) == [1, 2, 3, 4, 5, 6], "the others are read from metrics.jsonl"


def test_a_damaged_state_starts_a_new_run(tmp_path, recorder, caplog):
    (tmp_path / "loggers").mkdir()
    (tmp_path / "loggers" / "wandb.json").write_text('{"id": ')
    writer = make_writer(tmp_path)
    write(writer, [1])
    writer.close()
    assert steps_of(recorder) == [1]
    assert "a new run is logged" in caplog.text
    assert json.loads((tmp_path / "loggers" / "wandb.json").read_text())["steps"]["loss"] == 1


def test_errors_of_the_key(monkeypatch):
    with pytest.raises(UserError, match=r"log.to='wadb' must be one of jsonl, tensorboard"):
        LogConfig(to=("jsonl", "wadb"))
    with pytest.raises(UserError, match="must be a tuple of names"):
        LogConfig(to=())
    monkeypatch.setitem(sys.modules, "mlflow", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'mae_jax\[mlflow\]'"):
        import_packages(("jsonl", "mlflow"))
    import_packages(("jsonl", "tensorboard"))


def test_messages_have_one_line():
    assert describe(ValueError("a\nb")) == "ValueError: a"
    assert describe(ValueError()) == "ValueError"
