"""RankMe against the formula, of matrices of known rank, in runs and in the command."""

import json

import numpy as np
import pytest
from PIL import Image

from mae_jax.evaluate import __main__
from mae_jax.evaluate.rankme import rankme
from mae_jax.utils.errors import UserError

RNG = np.random.default_rng(0)


def formula(features):
    """exp(entropy) of the eigenvalues' roots of the Gram matrix, normalized, + 1e-7."""
    sigma = np.sqrt(np.linalg.eigvalsh(features.T.astype(float) @ features).clip(0))
    p = sigma / sigma.sum() + 1e-7
    return np.exp(sum(-x * np.log(x) for x in p))


def test_effective_rank_of_known_matrices():
    orthonormal, _ = np.linalg.qr(RNG.normal(size=(60, 12)))
    assert rankme(orthonormal) == pytest.approx(12, rel=1e-4)
    assert rankme(orthonormal.T) == pytest.approx(12, rel=1e-4)
    line = RNG.normal(size=(60, 1)) @ RNG.normal(size=(1, 12))
    assert rankme(line) == pytest.approx(1, rel=1e-3)
    noise = RNG.normal(size=(60, 12)) * np.arange(1, 13)
    assert 5 < rankme(noise) < 12
    for matrix in (noise, noise.astype(np.float32), orthonormal[:, :5] @ RNG.normal(size=(5, 12))):
        assert rankme(matrix) == pytest.approx(formula(matrix), rel=1e-4)
    assert rankme(7 * noise) == pytest.approx(rankme(noise))
    assert rankme(np.zeros((6, 3))) == 1
    assert np.isnan(rankme(np.full((6, 3), np.inf)))


def test_at_most_25600_evenly_spaced_rows_count():
    features = RNG.normal(size=(51_199, 2))
    features[::2, 1] = 0  # of these, one direction only
    assert rankme(features) == pytest.approx(1, rel=1e-3)


def test_the_command_needs_no_labels(golden, tmp_path, capsys):
    for number in range(9):
        pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    checkpoint = str(golden / "mae" / "p0_plain" / "state_dict.safetensors")
    out = tmp_path / "ranks.json"
    flags = ["--checkpoint", checkpoint, "--data", str(tmp_path), "--num-heads", "2"]
    __main__.main([*flags, "--suite", "rankme", "--out", str(out)])
    rows = json.loads(out.read_text())["results"]
    assert [(row["measure"], row["features"], row["images"]) for row in rows] == [
        ("RankMe", "mean", 9),
        ("RankMe", "cls", 9),
    ]
    assert all(1 <= row["rank"] <= 9.01 for row in rows)
    assert "effective rank" in capsys.readouterr().out
    with pytest.raises(UserError, match="train does not exist"):
        __main__.main([*flags, "--suite", "rankme,knn"])
