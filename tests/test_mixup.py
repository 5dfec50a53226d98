"""What mixup, CutMix and random erasing draw; test_classify.py holds what they do with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mae_jax.tasks.mixup import Mixup, mix_images, random_erasing
from mae_jax.utils.errors import UserError

SIZE = (24, 40)  # height, width
BATCH = 4000
KINDS = ("mixup", "cutmix")


def draw(mixup, seed=0, batch=BATCH):
    return jax.tree.map(np.asarray, mixup.sample(jax.random.key(seed), batch, SIZE))


def same_rows(mix, left, right):
    return all((x[left] == x[right]).all() for x in mix)


def rows(mix):
    return set(zip(mix.lam.tolist(), mix.is_cutmix.tolist(), map(tuple, mix.box.tolist())))


def left_by_box(mix):
    """The share of the image that each row's box does not cover."""
    top, bottom, left, right = mix.box.T
    return 1 - (bottom - top) * (right - left) / (SIZE[0] * SIZE[1])


def distance(found, expected):
    """Kolmogorov-Smirnov's, between two samples."""
    grid = np.union1d(found, expected)
    cdf = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (found, expected)]
    return np.abs(cdf[0] - cdf[1]).max()


class TestMixup:
    def test_depends_on_the_key_alone(self):
        mixup = Mixup(0.8, 1.0, mode="elem")
        one, same, other = (draw(mixup, seed) for seed in (1, 1, 2))
        for left, right in zip(one, same):
            np.testing.assert_array_equal(left, right)
        assert all((left != right).any() for left, right in zip(one, other))

    def test_one_draw_per_batch(self):
        found = set()
        for seed in range(20):
            mix = draw(Mixup(0.8, 1.0), seed, 64)
            assert same_rows(mix, slice(None), slice(1))
            found |= rows(mix)
        assert len(found) > 15
        assert {cut for _, cut, *_ in found} == {True, False}

    @pytest.mark.parametrize("batch", [64, 65])
    def test_one_draw_per_pair(self, batch):
        blends, both = (draw(Mixup(0.8, cut, mode="pair"), batch=batch) for cut in (0.0, 1.0))
        assert len(rows(blends)) == (batch + 1) // 2
        assert same_rows(both, slice(None), slice(None, None, -1))

    def test_one_draw_per_image(self):
        assert len(rows(draw(Mixup(0.8, mode="elem"), batch=64))) == 64

    @pytest.mark.parametrize("prob", [0.0, 0.5, 1.0])
    def test_prob(self, prob):
        blend, paste = (Mixup(**{kind: 0.8}, prob=prob, mode="elem") for kind in KINDS)
        assert blend.active == paste.active == (prob > 0)
        wanted = pytest.approx(prob, abs=0.03 if prob == 0.5 else 0)
        assert (draw(blend).lam < 1).mean() == wanted
        pasted = draw(paste)
        assert pasted.is_cutmix.mean() == wanted
        assert (pasted.lam[~pasted.is_cutmix] == 1).all()

    def test_what_is_not_mixed_stays_as_it_is(self):
        pixels = jax.random.normal(jax.random.key(1), (64, *SIZE, 3))
        mix = Mixup(0.8, 1.0, prob=0.0, mode="elem").sample(jax.random.key(0), 64, SIZE)
        np.testing.assert_array_equal(mix_images(pixels, mix), pixels)

    def test_without_alphas_it_is_false(self):
        assert not Mixup().active
        assert Mixup(mixup=0.1).active
        assert Mixup(cutmix=0.1).active

    @pytest.mark.parametrize("switch", [0.0, 0.3, 1.0])
    def test_switch(self, switch):
        mix = draw(Mixup(0.8, 1.0, switch=switch, mode="elem"))
        assert mix.is_cutmix.mean() == pytest.approx(switch, abs=0.03 if switch == 0.3 else 0)

    @pytest.mark.parametrize("kind", KINDS)
    def test_one_kind_alone_is_never_switched(self, kind):
        assert (draw(Mixup(**{kind: 1.0}, mode="elem")).is_cutmix == (kind == "cutmix")).all()

    @pytest.mark.parametrize("alpha", [0.2, 0.8, 2.0])
    def test_shares_of_blends_are_beta(self, alpha):
        mix = draw(Mixup(alpha, 1.0, switch=0.3, mode="elem"))
        share = mix.lam[~mix.is_cutmix]
        assert (share >= 0).all()
        assert (share <= 1).all()
        assert share.mean() == pytest.approx(0.5, abs=0.03)
        assert share.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
        expected = np.random.default_rng(0).beta(alpha, alpha, 20_000)
        assert distance(share, expected) < 0.04

    def test_shares_of_pastes_are_what_the_box_leaves(self):
        mix = draw(Mixup(0.8, 1.0, mode="elem"))
        np.testing.assert_allclose(
            mix.lam[mix.is_cutmix], left_by_box(mix)[mix.is_cutmix], atol=1e-6
        )

    @pytest.mark.parametrize("alpha", [0.3, 1.0])
    def test_boxes_are_cutmixs(self, alpha):
        """Against numpy's draws of a box of area 1 - share around a pixel, cut to the image."""
        mix = draw(Mixup(cutmix=alpha, mode="elem"))
        rng = np.random.default_rng(0)
        ratio = np.sqrt(1 - rng.beta(alpha, alpha, 20_000))
        expected = []
        for side in SIZE:
            half, centre = (side * ratio).astype(int) // 2, rng.integers(side, size=20_000)
            expected += [np.maximum(centre - half, 0), np.minimum(centre + half, side)]
        expected = np.array(expected)
        for found, sides in zip(mix.box.T, expected):
            assert distance(found, sides) < 0.04
        areas = (expected[1] - expected[0]) * (expected[3] - expected[2])
        assert distance((1 - mix.lam) * SIZE[0] * SIZE[1], areas) < 0.04
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
    def test_bad_values_are_named(self, name, key, value):
        with pytest.raises(UserError, match=f"classify.{key}={value!r}"):
            Mixup(**{name: value})


class TestErase:
    def erased(self, size, prob=1.0, seed=0):
        """Images of the value 100 after erasing, and which pixels are erased."""
        pixels = jnp.full((BATCH, *size, 3), 100.0)
        pixels = np.asarray(random_erasing(jax.random.key(seed), pixels, prob))
        return pixels, (pixels != 100).all(axis=-1)

    def sides(self, mask):
        """Height and width of the boxes in which every pixel is erased."""
        rows, columns = mask.any(axis=2), mask.any(axis=1)
        np.testing.assert_array_equal(mask, rows[:, :, None] & columns[:, None, :])
        for lines in (rows, columns):  # without gaps
            assert (np.diff(lines.astype(int), prepend=0, append=0) == 1).sum(axis=1).max() == 1
        return rows.sum(axis=1), columns.sum(axis=1)

    @pytest.mark.parametrize("prob", [0.0, 0.25, 1.0])
    def test_share_of_erased_images(self, prob):
        pixels, mask = self.erased((8, 12), prob)
        assert mask.any(axis=(1, 2)).mean() == pytest.approx(prob, abs=0.03 if prob == 0.25 else 0)
        assert (pixels[~mask] == 100).all(), "one channel alone is never erased"

    def test_depends_on_the_key_alone(self):
        one, same, other = (self.erased((8, 12), 0.5, seed)[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()

    @pytest.mark.parametrize("size", [(24, 24), (24, 40), (64, 16)])
    def test_boxes_are_the_references(self, size):
        """Against the loop of up to ten attempts, whose sides are rounded to whole pixels."""
        mask = self.erased(size)[1]
        h, w = self.sides(mask)
        area = size[0] * size[1]
        assert ((h + 0.5) * (w + 0.5) >= 0.02 * area).all()
        assert ((h - 0.5) * (w - 0.5) <= area / 3).all()
        rng, expected = np.random.default_rng(0), []
        for _ in range(10_000):
            for _ in range(10):
                target, log_aspect = (
                    rng.uniform(0.02, 1 / 3) * area,
                    np.log(0.3) * rng.uniform(-1, 1),
                )
                sides = np.round(np.sqrt(target * np.exp([log_aspect, -log_aspect])))
                if (sides < size).all():
                    top, left = (rng.integers(whole - side + 1) for whole, side in zip(size, sides))
                    expected.append((*sides, top, left))
                    break
        found = (h, w, mask.any(axis=2).argmax(axis=1), mask.any(axis=1).argmax(axis=1))
        for ours, theirs in zip(found, np.transpose(expected)):
            assert distance(ours, theirs) < 0.04

    def test_noise_is_normal_and_new_for_every_value(self):
        pixels, mask = self.erased((8, 12))
        noise = pixels[mask]
        assert len(np.unique(noise)) > 0.98 * noise.size
        assert distance(noise.ravel(), np.random.default_rng(0).normal(size=50_000)) < 0.015
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.03, "channels have their own"
