import json
import math

import jax
import jax.numpy as jnp
import pytest

from mae_jax.train.metrics_writer import MetricsLogger, truncate_jsonl
from mae_jax.utils.atomic import write_json


def make_log(workdir, start_step=0, **kwargs):
    defaults = dict(total_steps=10, steps_per_epoch=5, batch_size=4, every=2)
    defaults |= dict(flops_per_image=1e9, peak_flops=None, advice="more of it")
    return MetricsLogger(workdir, start_step=start_step, **(defaults | kwargs))


def steps(log, numbers):
    for step in numbers:
        with log.waiting(step):
            pass
        log.step_done(step, {"loss": float(step), "grad_norm": 1.0, "learning_rate": 0.1 * step})


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_lines_carry_means_and_rates(tmp_path):
    log = make_log(tmp_path, peak_flops=1e12)
    steps(log, range(1, 5))
    log.scalars(4, {"knn_top1": 0.5})
    log.close()
    first, second, third = rows(tmp_path)
    assert [first["step"], first["epoch"], first["loss"]] == [2, 0.4, 1.5]
    assert second["loss"] == 3.5
    assert second["learning_rate"] == pytest.approx(0.4)
    assert 0 <= second["data_wait"] <= 1
    assert second["mfu"] == pytest.approx(second["images_per_second"] * 1e9 / 1e12, rel=1e-2)
    assert third == {"step": 4, "epoch": 0.8, "knn_top1": 0.5}
    assert log.column("loss") == [1.5, 3.5]
    assert list((tmp_path / "tensorboard").iterdir())


def test_no_mfu_where_the_peak_is_unknown(tmp_path):
    log = make_log(tmp_path)
    steps(log, range(1, 3))
    log.close()
    assert "mfu" not in rows(tmp_path)[0]


def test_continuing_leaves_no_line_twice_and_none_out(tmp_path):
    log = make_log(tmp_path)
    steps(log, range(1, 9))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('[1]\n{"loss": 1.0}\n{"step": 8, "lo')  # killed in the middle of a line
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\n")
    log = make_log(tmp_path, start_step=4)
    assert log.column("loss") == [1.5, 3.5]
    steps(log, range(5, 11))
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 10]


def test_truncating_nothing(tmp_path):
    assert truncate_jsonl(tmp_path / "none.jsonl", 3) == []
    assert not list(tmp_path.iterdir())


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"b": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_skipped_steps_are_counted_and_left_out_of_means(tmp_path):
    log = make_log(tmp_path)
    steps(log, [1])
    log.step_done(2, {"loss": math.nan, "grad_norm": math.nan, "learning_rate": 0.1, "skipped": 1})
    log.skipped(2, {"images": ["a"]})
    for step in (3, 4):
        log.step_done(step, {"loss": math.nan, "grad_norm": 1, "learning_rate": 0.1, "skipped": 1})
    log.close()
    first, second = rows(tmp_path)
    assert (first["loss"], first["skipped_steps"]) == (1.0, 1)
    assert "loss" not in second
    assert second["skipped_steps"] == 2
    assert json.loads((tmp_path / "skipped.jsonl").read_text()) == {"step": 2, "images": ["a"]}


def test_going_back_forgets_what_came_after(tmp_path):
    log = make_log(tmp_path)
    steps(log, range(1, 7))
    log.rewind(2)
    steps(log, range(3, 5))
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]
    assert log.column("loss") == [1.5, 3.5]


def test_only_the_main_process_writes(tmp_path):
    log = make_log(tmp_path, main=False, profile=(1, 2))
    steps(log, range(1, 5))
    log.skipped(4, {"images": []})
    log.rewind(2)
    log.close()
    assert not list(tmp_path.iterdir())


def test_a_profile_of_some_steps(tmp_path):
    log = make_log(tmp_path, profile=(2, 2))
    add = jax.jit(lambda x: x + 1)
    for step in range(1, 6):
        with log.waiting(step):
            pass
        with log.computing(step):
            add(jnp.zeros(3)).block_until_ready()
    log.close()
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0


def test_memory_is_in_the_log(tmp_path):
    log = make_log(tmp_path)
    steps(log, range(1, 3))
    log.close()
    assert 0.05 < rows(tmp_path)[0]["host_memory"] < 100
