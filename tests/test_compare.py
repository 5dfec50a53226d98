"""mae-jax compare: tables and curves of finished runs and of runs in progress."""

import importlib.util
import json

import pytest
from PIL import Image

from mae_jax.train.compare import main
from mae_jax.utils.errors import UserError


def write_run(folder, rate, losses, *, finished=True, torn=False):
    """Write what a run leaves: rows of the loss every 10 steps, k-NN and RankMe in the last."""
    folder.mkdir()
    config = {"seed": 0, "optim": {"base_lr": rate, "b1": 0.9}, "data": {"mean": [0.5]}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"step": 0, "epoch": 0.0, "yardstick_patch_mean": 0.9, "yardstick_nearest": 0.8}]
    for number, loss in enumerate(losses, 1):
        rows.append({"step": 10 * number, "epoch": number / 2, "loss": loss})
        rows[-1]["images_per_second"] = 1000.0 * number
    rows.append({"step": 10 * len(losses), "epoch": 1.0, "knn_top1": 0.5, "rankme": 12.34})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "epo' * torn)
    if finished:
        (folder / "summary.json").write_text(json.dumps({"steps": 10 * len(losses)}))


@pytest.fixture
def runs(tmp_path):
    write_run(tmp_path / "slow", 0.001, [0.9, 0.7, 0.75])
    write_run(tmp_path / "fast", 0.01, [0.8, float("nan")], finished=False, torn=True)
    write_run(tmp_path / "also fast", 0.01, [0.8])
    return [str(tmp_path / name) for name in ("slow", "fast", "also fast")]


def cells(text, first):
    return " ".join(next(x for x in text.splitlines() if x.strip().startswith(first)).split())


def test_tables_of_results_and_differing_keys(runs, capsys):
    main(runs)
    text = capsys.readouterr().out
    assert cells(text, "slow") == "slow finished 30 0.7500 0.7000 2,000 0.500 12.3"
    assert cells(text, "fast") == "fast unfinished 20 - 0.8000 1,500 0.500 12.3"
    assert cells(text, "optim.base_lr") == "optim.base_lr 0.001 slow"
    assert "0.01    fast, also fast" in text
    for same in ("seed", "b1", "data.mean", "probe"):
        assert same not in text
    main(runs[1:])
    assert "all runs have the same config" in capsys.readouterr().out


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="draws the curves")
def test_curves_are_drawn(runs, tmp_path):
    out = tmp_path / "figures" / "curves.png"
    main([*runs, "--out", str(out)])
    with Image.open(out) as figure:
        width, height = figure.size
    assert width > 3 * height, "loss, k-NN, RankMe and throughput side by side"


def test_runs_that_have_just_begun(tmp_path, capsys):
    write_run(tmp_path / "new", 0.1, [])
    (tmp_path / "new" / "metrics.jsonl").unlink()
    (tmp_path / "new" / "summary.json").unlink()
    main([str(tmp_path / "new")])
    assert cells(capsys.readouterr().out, "new") == "new unfinished 0 - - -"
    with pytest.raises(UserError, match="no run has metrics to draw yet"):
        main([str(tmp_path / "new"), "--out", str(tmp_path / "a.png")])


def test_errors_name_the_folder(runs, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        main([*runs, str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match=f"{tmp_path} is not the workdir of a run"):
        main([str(tmp_path)])
    (tmp_path / "slow" / "config.json").write_text("{")
    with pytest.raises(UserError, match="slow/config.json cannot be read"):
        main(runs)
