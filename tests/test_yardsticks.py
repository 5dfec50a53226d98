"""Yardsticks of the pretraining loss against loops over patches, and the warning about them."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

from mae_jax.models.mae import make_mae
from mae_jax.models.variants import VitVariant
from mae_jax.tasks.pretrain import Pretrain
from mae_jax.tasks.yardsticks import fill_masked, yardstick_losses
from mae_jax.train.yardsticks import LossCheck

GRID, PATCH = (4, 6), 4
TINY = VitVariant(8, 1, 1, PATCH, decoder_width=8, decoder_depth=1, decoder_heads=1)
RNG = np.random.default_rng(0)


def task_of(channels, **kwargs):
    mean, std = tuple(np.linspace(0.3, 0.6, channels)), tuple(np.linspace(0.2, 0.3, channels))
    model = make_mae(TINY, grid=GRID, channels=channels)
    return Pretrain(model=model, grid=GRID, patch=PATCH, mean=mean, std=std, **kwargs)


def expected_losses(task, images, mask):
    """The losses of the mean and of the nearest patch, one patch at a time in float64."""
    pixels = np.float64(images) / (255 if images.dtype == np.uint8 else 1)
    pixels = (pixels - task.mean) / task.std
    cells = [(y, x) for y in range(GRID[0]) for x in range(GRID[1])]
    errors = {"patch_mean": [], "nearest": []}
    for image, kept, masked in zip(pixels, *map(np.asarray, mask)):
        cut = [
            image[y * PATCH : (y + 1) * PATCH, x * PATCH : (x + 1) * PATCH].ravel()
            for y, x in cells
        ]
        for i in masked:
            distances = {k: np.hypot(*np.subtract(cells[i], cells[k])) for k in sorted(kept)}
            predicted = {
                "patch_mean": np.full_like(cut[i], cut[i].mean()),
                "nearest": cut[min(distances, key=distances.get)],
            }
            for name, values in predicted.items():
                target = cut[i]
                if task.norm_pix:
                    target, values = (
                        (x - x.mean()) / np.sqrt(x.var(ddof=1) + task.norm_pix_eps)
                        for x in (target, values)
                    )
                errors[name].append(np.square(values - target).mean())
    return {name: np.mean(values) for name, values in errors.items()}


@pytest.mark.parametrize(
    ("channels", "dtype", "options"),
    [
        (3, np.uint8, dict()),
        (3, np.uint8, dict(norm_pix=False, mask="grid")),
        (1, np.uint8, dict(mask="block", mask_ratio=0.5, predict_ratio=0.5)),
        (5, np.float32, dict(norm_pix=False, mask="user", user_mask=np.arange(24) % 5 > 0)),
    ],
    ids=["norm_pix", "grid", "block", "bands"],
)
def test_losses_are_those_of_the_predictions(channels, dtype, options):
    task = task_of(channels, **options)
    images = RNG.integers(0, 256, (6, 16, 24, channels))
    images = images.astype(dtype) if dtype == np.uint8 else np.float32(images / 255)
    mask = jax.jit(task.sample_mask, static_argnums=1)(jax.random.key(0), 6)
    losses = yardstick_losses(task, [images[:3], images[3:]], mask)
    for name, expected in expected_losses(task, images, mask).items():
        assert losses[name] == pytest.approx(expected, rel=1e-4), name
    if task.norm_pix:  # 1, but for the unbiased variance; and there is nothing to predict in noise
        assert losses["interpolation"] > losses["patch_mean"]
        values = PATCH * PATCH * channels
        assert losses["patch_mean"] == pytest.approx((values - 1) / values, rel=1e-3)


def test_interpolation_predicts_what_changes_slowly():
    rows, columns = np.indices((16, 24))
    ramp = np.uint8(100 + 4 * rows + columns)[None, :, :, None].repeat(3, axis=-1)
    task = task_of(3, norm_pix=False, mask="grid")
    mask = task.sample_mask(jax.random.key(0), 1)
    losses = yardstick_losses(task, [ramp], mask)
    assert losses["interpolation"] < 0.3 * losses["nearest"]
    flat = yardstick_losses(task, [np.full_like(ramp, 77)], mask)
    assert flat["nearest"] == flat["interpolation"] == 0.0


def test_pixels_are_filled_in_from_half_the_size():
    visible = np.array([[[True, False, True, False, False]]])
    image = np.array([0.0, 9.0, 8.0, 9.0, 9.0]).reshape(1, 1, 5, 1)
    # Halves: [0, 8, ?], [4, ?], [4]; and back: [4, 4], [0, 8, 4].
    np.testing.assert_allclose(fill_masked(image, visible).ravel(), [0, 2, 8, 7, 5])


def check_of(folder, **kwargs):
    values = {"patch_mean": 1.0, "nearest": 1.5, "interpolation": 0.5}
    options = dict(values=values, to_beat=1.0, first=4, last=6, path=folder / "yardsticks.json")
    return LossCheck(**(options | kwargs))


def warnings(caplog, check, losses):
    """Return the warnings after steps 1, 2, ... with these losses; None is skipped."""
    caplog.clear()
    for step, loss in enumerate(losses, 1):
        metrics = {"loss": np.nan, "skipped": 1.0} if loss is None else {"loss": loss}
        check.step_done(step, metrics)
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


def test_a_run_that_beats_no_yardstick_warns_once(tmp_path, caplog):
    check = check_of(tmp_path)
    (message,) = warnings(caplog, check, [2.0] * 8)
    assert "the loss, 2.000 up to step 6, beats no yardstick up to 1.000: 1.000 for each" in message
    assert warnings(caplog, check, [2.0] * 8) == [], "after a rollback"
    assert json.loads(check.path.read_text())["warned_at"] == 6
    # Only the steps after warm-up and an epoch count, each of them once and only if it was taken.
    assert warnings(caplog, check_of(tmp_path), [2.0, 2.0, 2.0, 2.0, 0.9, 1.0]) == []
    assert warnings(caplog, check_of(tmp_path), [0.1, 0.1, 0.1, 0.1, None, 1.0]) != []
    rolled_back = check_of(tmp_path)
    assert warnings(caplog, rolled_back, [2.0] * 5) == []
    assert warnings(caplog, rolled_back, [0.9] * 6) == []
    without = check_of(tmp_path, values={}, to_beat=np.inf)
    assert warnings(caplog, without, [2.0] * 8) == []
    assert dataclasses.replace(check, values={}).summary() == {}
