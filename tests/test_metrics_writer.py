"""Metrics on disk, and what the logger measures, with a clock that the tests move."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from mae_jax.train.metrics_writer import MetricsWriter, truncate_jsonl
from mae_jax.train.progress import MetricsLogger, Profiler
from mae_jax.utils.atomic import write_json


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make_logger(workdir, start_step=0, *, enabled=True, profile=None, clock=None, **kwargs):
    writer = MetricsWriter(workdir, start_step=start_step, steps_per_epoch=5, enabled=enabled)
    options = dict(total_steps=10, steps_per_epoch=5, batch_size=4, every=2, show=enabled)
    options |= dict(flops_per_image=1e9, peak_flops=None, input_bound_hint="more cores")
    first, count = profile or (None, 1)
    profiler = Profiler(workdir / "profile", first, count)
    options |= dict(profiler=profiler, clock=clock or Clock())
    return MetricsLogger(writer, start_step=start_step, **(options | kwargs))


def run_steps(logger, steps, clock=None, wait=0.0, compute=0.0):
    for step in steps:
        with logger.waiting(step):
            if clock:
                clock.now += wait
        with logger.computing(step):
            if clock:
                clock.now += compute
        metrics = {"loss": float(step), "grad_norm": 1.0, "learning_rate": 0.1 * step}
        logger.step_done(step, metrics)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_rows_have_means_throughput_and_mfu(tmp_path):
    clock = Clock()
    logger = make_logger(tmp_path, peak_flops=1e12, clock=clock)
    run_steps(logger, range(1, 5), clock, wait=0.5, compute=1.5)
    logger.writer.write_scalars(4, {"knn_top1": 0.5})
    logger.close()
    first, second, third = rows(tmp_path)
    assert [first["step"], first["epoch"], first["loss"]] == [2, 0.4, 1.5]
    assert second["loss"] == 3.5
    assert second["learning_rate"] == pytest.approx(0.4)
    assert second["images_per_second"] == 2.0  # 4 images in 2 seconds
    assert second["data_wait"] == 0.25
    assert second["mfu"] == pytest.approx(2.0 * 1e9 / 1e12)
    assert 0.05 < second["host_memory"] < 100
    assert third == {"step": 4, "epoch": 0.8, "knn_top1": 0.5}
    assert logger.writer.history("loss") == [1.5, 3.5]
    assert list((tmp_path / "tensorboard").iterdir())


def test_pauses_do_not_count(tmp_path):
    clock = Clock()
    logger = make_logger(tmp_path, clock=clock)
    run_steps(logger, range(1, 4), clock, compute=1.0)
    with logger.paused(3):
        clock.now += 100.0
    run_steps(logger, [4], clock, compute=1.0)
    logger.close()
    assert rows(tmp_path)[1]["images_per_second"] == 4.0


@pytest.mark.parametrize("dispatch", [0.0, 1.0], ids=["asynchronous", "synchronous"])
def test_every_step_has_its_own_time_also_around_pauses(tmp_path, dispatch):
    """The loop sees steps one late, but before a pause; the devices take a second for each."""
    clock = Clock()
    logger = make_logger(tmp_path, clock=clock, every=1)

    def done(step):  # waits for the devices where the dispatch did not
        clock.now += 1.0 - dispatch
        logger.step_done(step, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1})

    for step in range(1, 8):
        with logger.computing(step):
            clock.now += dispatch
            if step not in (1, 4):  # the step before was seen
                done(step - 1)
        if step == 3:
            done(step)
            with logger.paused(step):
                clock.now += 100.0
    logger.close()
    assert [row.get("images_per_second") for row in rows(tmp_path)] == [None, *[4.0] * 5]


def test_no_mfu_if_the_peak_is_unknown(tmp_path):
    logger = make_logger(tmp_path)
    run_steps(logger, range(1, 3))
    logger.close()
    assert "mfu" not in rows(tmp_path)[0]


def test_waiting_for_data_is_warned_of_once(tmp_path, caplog):
    clock = Clock()
    logger = make_logger(tmp_path, clock=clock)
    for count in (0, 2, 1, 2):
        logger.batches_ready(count)
    run_steps(logger, range(1, 9), clock, wait=2.0, compute=1.0)
    logger.close()
    assert rows(tmp_path)[0]["data_ready"] == 1.25
    messages = [r.getMessage() for r in caplog.records if "waits for images" in r.getMessage()]
    assert messages == ["training waits for images 67 % of the time. Remedies: more cores"]


def test_resuming_leaves_every_row_once(tmp_path):
    logger = make_logger(tmp_path)
    run_steps(logger, range(1, 9))
    logger.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"loss": 1.0}\n{"step": 8, "lo')  # killed within a line
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\n")
    logger = make_logger(tmp_path, start_step=4)
    assert logger.writer.history("loss") == [1.5, 3.5]
    run_steps(logger, range(5, 11))
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 10]


def test_truncating_a_missing_file(tmp_path):
    truncate_jsonl(tmp_path / "none.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_json_is_written_atomically(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_skipped_steps_are_counted_and_left_out_of_means(tmp_path):
    logger = make_logger(tmp_path)
    run_steps(logger, [1])
    skipped = {"loss": math.nan, "grad_norm": math.nan, "learning_rate": 0.1, "skipped": 1}
    logger.step_done(2, skipped)
    logger.writer.write_skipped(2, {"images": ["a"]})
    for step in (3, 4):
        logger.step_done(step, skipped)
    logger.close()
    first, second = rows(tmp_path)
    assert (first["loss"], first["skipped_steps"]) == (1.0, 1)
    assert "loss" not in second
    assert second["skipped_steps"] == 2
    assert json.loads((tmp_path / "skipped.jsonl").read_text()) == {"step": 2, "images": ["a"]}


def test_rolling_back_drops_later_rows(tmp_path):
    logger = make_logger(tmp_path)
    run_steps(logger, range(1, 7))
    logger.rewind(2)
    run_steps(logger, range(3, 5))
    logger.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]
    assert logger.writer.history("loss") == [1.5, 3.5]


def test_secondary_processes_write_nothing(tmp_path):
    logger = make_logger(tmp_path, enabled=False)
    run_steps(logger, range(1, 5))
    logger.writer.write_skipped(4, {"images": []})
    logger.rewind(2)
    logger.close()
    assert not list(tmp_path.iterdir())


def test_a_profile_of_some_steps(tmp_path):
    logger = make_logger(tmp_path, profile=(2, 2))
    add = jax.jit(lambda x: x + 1)
    for step in range(1, 6):
        with logger.waiting(step):
            pass
        with logger.computing(step):
            add(jnp.zeros(3)).block_until_ready()
    logger.close()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
