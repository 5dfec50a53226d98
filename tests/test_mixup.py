"""Distributions of mixup, CutMix and random erasing; test_classify.py tests the mixing itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.tasks.mixup import Mixup, mix_images, random_erasing
from mae_jax.utils.errors import UserError

SIZE = (24, 40)  # height, width
BATCH = 4000
SMALL_BATCH = 65  # odd: the image in the middle is its own partner
KINDS = ("mixup", "cutmix")


def sample(mixup, seed=0, batch=BATCH):
    return jax.tree.map(np.asarray, mixup.sample(jax.random.key(seed), batch, SIZE))


def equal_rows(mix, left, right):
    return all((x[left] == x[right]).all() for x in mix)


def distinct_rows(mix):
    return set(zip(mix.lam.tolist(), mix.is_cutmix.tolist(), map(tuple, mix.box.tolist())))


def uncovered(mix):
    """Return the fraction of the image that the box of each row does not cover."""
    top, bottom, left, right = mix.box.T
    return 1 - (bottom - top) * (right - left) / (SIZE[0] * SIZE[1])


def ks_distance(actual, expected):
    """Return the Kolmogorov-Smirnov statistic of two samples."""
    grid = np.union1d(actual, expected)
    cdf = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (actual, expected)]
    return np.abs(cdf[0] - cdf[1]).max()


class TestMixup:
    def test_is_deterministic_in_the_key(self):
        mixup = Mixup(0.8, 1.0, mode="elem")
        one, same, other = (sample(mixup, seed) for seed in (1, 1, 2))
        for left, right in zip(one, same):
            np.testing.assert_array_equal(left, right)
        assert all((left != right).any() for left, right in zip(one, other))

    def test_one_sample_per_batch(self):
        rows = set()
        for seed in range(20):
            mix = sample(Mixup(0.8, 1.0), seed, SMALL_BATCH)
            assert equal_rows(mix, slice(None), slice(1))
            rows |= distinct_rows(mix)
        assert len(rows) > 15
        assert {is_cutmix for _, is_cutmix, _ in rows} == {True, False}

    def test_one_sample_per_pair(self):
        mixup, both = (sample(Mixup(0.8, a, mode="pair"), batch=SMALL_BATCH) for a in (0.0, 1.0))
        assert len(distinct_rows(mixup)) == (SMALL_BATCH + 1) // 2
        assert equal_rows(both, slice(None), slice(None, None, -1))

    def test_one_sample_per_image(self):
        mix = sample(Mixup(0.8, mode="elem"), batch=SMALL_BATCH)
        assert len(distinct_rows(mix)) == SMALL_BATCH

    @pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
    def test_prob(self, prob):
        mixup, cutmix = (Mixup(**{kind: 0.8}, prob=prob, mode="elem") for kind in KINDS)
        assert mixup.active == cutmix.active == (prob > 0)
        expected = pytest.approx(prob, abs=0.03 if prob == 0.5 else 0)
        assert (sample(mixup).lam < 1).mean() == expected
        mix = sample(cutmix)
        assert mix.is_cutmix.mean() == expected
        assert (mix.lam[~mix.is_cutmix] == 1).all()

    def test_images_that_are_not_mixed_do_not_change(self):
        pixels = np.random.default_rng(1).normal(size=(SMALL_BATCH, *SIZE, 3)).astype(np.float32)
        mix = sample(Mixup(0.8, 1.0, prob=0.0, mode="elem"), batch=SMALL_BATCH)
        mixed = mix_images(jnp.asarray(pixels), jax.tree.map(jnp.asarray, mix))
        np.testing.assert_array_equal(mixed, pixels)

    def test_is_active_if_an_alpha_is_positive(self):
        assert not Mixup().active
        assert Mixup(mixup=0.1).active
        assert Mixup(cutmix=0.1).active

    @pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
    def test_switch(self, switch):
        mix = sample(Mixup(0.8, 1.0, switch=switch, mode="elem"))
        assert mix.is_cutmix.mean() == pytest.approx(switch, abs=0.03 if switch == 0.3 else 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_kind_alone_is_never_switched(self, kind):
        assert (sample(Mixup(**{kind: 1.0}, mode="elem")).is_cutmix == (kind == "cutmix")).all()

    @pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
    def test_lambda_of_mixup_has_a_beta_distribution(self, alpha):
        mix = sample(Mixup(alpha, 1.0, switch=0.3, mode="elem"))
        lam = mix.lam[~mix.is_cutmix]
        assert (lam >= 0).all()
        assert (lam <= 1).all()
        assert lam.mean() == pytest.approx(0.5, abs=0.03)
        assert lam.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
        expected = np.random.default_rng(0).beta(alpha, alpha, 20_000)
        assert ks_distance(lam, expected) < 0.04

    def test_lambda_of_cutmix_is_the_uncovered_area(self):
        mix = sample(Mixup(0.8, 1.0, mode="elem"))
        expected = uncovered(mix)[mix.is_cutmix]
        np.testing.assert_allclose(mix.lam[mix.is_cutmix], expected, atol=1e-6)

    @pytest.mark.parametrize("alpha", [0.3, 1.0])
    def test_distribution_of_cutmix_boxes(self, alpha):
        """Against boxes of area 1 - lambda around a pixel, sampled by numpy, clipped."""
        mix = sample(Mixup(cutmix=alpha, mode="elem"))
        rng = np.random.default_rng(0)
        ratio = np.sqrt(1 - rng.beta(alpha, alpha, 20_000))
        expected = []
        for side in SIZE:
            half, center = (side * ratio).astype(int) // 2, rng.integers(side, size=20_000)
            expected += [np.maximum(center - half, 0), np.minimum(center + half, side)]
        expected = np.array(expected)
        for actual, sides in zip(mix.box.T, expected):
            assert ks_distance(actual, sides) < 0.04
        areas = (expected[1] - expected[0]) * (expected[3] - expected[2])
        assert ks_distance((1 - mix.lam) * SIZE[0] * SIZE[1], areas) < 0.04
        assert mix.box.min() == 0
        assert mix.box.max(axis=0).tolist()[1::2] == list(SIZE)

    @pytest.mark.parametrize(
        ("name", "key", "value"),
        [
            ("mixup", "mixup", -0.1),
            ("cutmix", "cutmix", -1.0),
            ("prob", "mixup_prob", 1.5),
            ("prob", "mixup_prob", -0.5),
            ("switch", "mixup_switch", 2.0),
            ("mode", "mixup_mode", "row"),
        ],
    )
    def test_invalid_values_are_named(self, name, key, value):
        with pytest.raises(UserError, match=f"classify.{key}={value!r}"):
            Mixup(**{name: value})


class TestRandomErasing:
    def erased(self, size, prob=1.0, seed=0, channels=3):
        """Return images of the value 100 after erasing, and which pixels are erased."""
        pixels = jnp.full((BATCH, *size, channels), 100.0)
        pixels = np.asarray(random_erasing(jax.random.key(seed), pixels, prob))
        return pixels, (pixels != 100).all(axis=-1)

    def sides(self, mask):
        """Return height and width of the erased boxes; check that they have no gaps."""
        rows, columns = mask.any(axis=2), mask.any(axis=1)
        np.testing.assert_array_equal(mask, rows[:, :, None] & columns[:, None, :])
        for lines in (rows, columns):
            assert (np.diff(lines.astype(int), prepend=0, append=0) == 1).sum(axis=1).max() == 1
        return rows.sum(axis=1), columns.sum(axis=1)

    @pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
    def test_probability(self, prob):
        pixels, mask = self.erased((8, 12), prob)
        assert mask.any(axis=(1, 2)).mean() == pytest.approx(prob, abs=0.03 if prob == 0.25 else 0)
        assert (pixels[~mask] == 100).all(), "all channels are erased together"

    def test_is_deterministic_in_the_key(self):
        one, same, other = (self.erased((8, 12), 0.5, seed)[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()

    @pytest.mark.parametrize("size", [(24, 40), (64, 16)])
    def test_distribution_of_boxes(self, size):
        """Against the reference's loop of up to ten attempts with sides rounded to pixels."""
        mask = self.erased(size, channels=1)[1]
        h, w = self.sides(mask)
        area = size[0] * size[1]
        assert ((h + 0.5) * (w + 0.5) >= 0.02 * area).all()
        assert ((h - 0.5) * (w - 0.5) <= area / 3).all()
        rng, shape = np.random.default_rng(0), (10_000, 10)
        target, log_aspect = (
            rng.uniform(0.02, 1 / 3, shape),
            np.log(0.3) * rng.uniform(-1, 1, shape),
        )
        sides = np.exp(np.stack([log_aspect, -log_aspect], axis=-1))
        sides = np.round(np.sqrt(area * target[..., None] * sides))
        fits = (sides < size).all(axis=-1)
        sides = sides[np.arange(len(sides)), fits.argmax(axis=1)][fits.any(axis=1)]
        corners = rng.integers(size - sides + 1)
        actual = (h, w, mask.any(axis=2).argmax(axis=1), mask.any(axis=1).argmax(axis=1))
        for sample, reference in zip(actual, np.concatenate([sides, corners], axis=1).T):
            assert ks_distance(sample, reference) < 0.04

    def test_noise_is_normal_and_independent(self):
        pixels, mask = self.erased((8, 12))
        noise = pixels[mask]
        assert len(np.unique(noise)) > 0.98 * noise.size
        assert ks_distance(noise.ravel(), np.random.default_rng(0).normal(size=50_000)) < 0.015
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03, "channels are independent"
