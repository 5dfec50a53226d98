"""RandAugment's operations by what they do to pixels, the law of weak crops, and transforms."""

import io
import math
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from mae_jax.data.randaugment import BICUBIC, OPERATIONS, OpParams, RandAugment
from mae_jax.data.transforms import TrainTransform, crop_sides, random_crop_box, single_try_crop_box

FILL = {"RGB": (124, 116, 104), "L": 124}
SIGNED = {"rotate", "color", "contrast", "brightness", "sharpness"}
SIGNED |= {"shear_x", "shear_y", "translate_x", "translate_y"}
LAWS = {"crop": random_crop_box, "weak_crop": single_try_crop_box, "randaugment": random_crop_box}


def noise_image(mode="RGB", size=(80, 40), low=0, high=256):
    """An image of size width, height with values from low to high - 1."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8))


def apply(name, image, level=1.0, sign=1):
    changed = OPERATIONS[name](image, OpParams(level, sign, FILL[image.mode]))
    assert (changed.mode, changed.size) == (image.mode, image.size)
    return np.asarray(changed).astype(int)


def assert_image(found, expected):
    np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.fixture(params=["RGB", "L"])
def image(request):
    return noise_image(request.param)


class TestOperations:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_only_some_have_a_sign(self, name, image):
        plus, minus = (apply(name, image, 0.7, sign) for sign in (1, -1))
        no_colours = name == "color" and image.mode == "L"
        assert (plus != minus).any() == (name in SIGNED and not no_colours)

    @pytest.mark.parametrize("name", sorted(SIGNED | {"solarize", "solarize_add"}))
    def test_level_0_changes_nothing(self, name, image):
        assert_image(apply(name, image, 0.0), image)

    def test_invert(self, image):
        assert_image(apply("invert", image), 255 - np.asarray(image))

    def test_autocontrast_stretches_every_channel(self, image):
        narrow = image.point(lambda value: 40 + value // 3)
        stretched = apply("autocontrast", narrow)
        assert_image(stretched, ImageOps.autocontrast(narrow))
        assert (stretched.min(axis=(0, 1)) == 0).all()
        assert (stretched.max(axis=(0, 1)) >= 254).all()

    def test_equalize_flattens_the_histogram(self, image):
        dark = image.point(lambda value: value**2 // 255)
        flat = apply("equalize", dark)
        assert_image(flat, ImageOps.equalize(dark))
        assert np.asarray(dark).mean() < 100
        assert 115 < flat.mean() < 140

    @pytest.mark.parametrize(("level", "bits"), [(0.0, 4), (0.24, 4), (0.25, 3), (0.9, 1), (1, 0)])
    def test_posterize_keeps_bits(self, image, level, bits):
        step = 2 ** (8 - bits)
        expected = np.asarray(image).astype(int) // step * step
        assert_image(apply("posterize", image, level), expected)

    @pytest.mark.parametrize(("level", "threshold"), [(0.25, 192), (0.9, 26), (1.0, 0)])
    def test_solarize_inverts_from_a_threshold_on(self, image, level, threshold):
        before = np.asarray(image)
        expected = np.where(before < threshold, before, 255 - before)
        assert_image(apply("solarize", image, level), expected)

    @pytest.mark.parametrize(("level", "added"), [(0.5, 55), (0.9, 99), (1.0, 110)])
    def test_solarize_add_brightens_dark_values(self, image, level, added):
        before = np.asarray(image).astype(int)
        expected = np.where(before < 128, before + added, before)
        assert_image(apply("solarize_add", image, level), expected)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(("level", "degrees"), [(0.1, 3), (0.5, 15), (1.0, 30)])
    def test_rotate(self, image, level, degrees, sign):
        expected = image.rotate(sign * degrees, resample=BICUBIC, fillcolor=FILL[image.mode])
        assert_image(apply("rotate", image, level, sign), expected)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_rotate_is_counter_clockwise_for_a_positive_sign(self, sign):
        black = Image.new("L", (41, 41))
        black.paste(255, (34, 18, 39, 23))  # right of the centre, 16 pixels away
        row, column = np.argwhere(apply("rotate", black, 1.0, sign) == 255).mean(axis=0)
        assert abs(row - (20 - sign * 16 * math.sin(math.pi / 6))) < 0.5
        assert abs(column - (20 + 16 * math.cos(math.pi / 6))) < 0.5

    @pytest.mark.parametrize("level", [0.5, 1.0])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_translate(self, image, axis, level):
        """A positive sign moves it left or up by .45 of the width, 80, or height, 40."""
        name, pixels = ("translate_y", "translate_x")[axis], int(level * (18, 36)[axis])
        forward, backward = (np.moveaxis(apply(name, image, level, s), axis, 0) for s in (1, -1))
        before = np.moveaxis(np.asarray(image), axis, 0)
        assert_image(forward[:-pixels], before[pixels:])
        assert_image(backward[pixels:], before[:-pixels])
        outside = np.concatenate([forward[-pixels:], backward[:pixels]])
        assert (outside == FILL[image.mode]).all()

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("level", [0.3, 1.0])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_shear(self, axis, level, sign):
        """On a ramp along one axis values grow, from the first row on, along the other."""
        ramp = np.tile(np.arange(40, 200, 2, dtype=np.uint8), (20, 1))
        image = Image.fromarray(ramp if axis == 1 else ramp.T)
        sheared = apply(("shear_y", "shear_x")[axis], image, level, sign)
        sheared = sheared if axis == 1 else sheared.T
        shift = sign * level * 0.3 * (np.arange(20) + 0.5)
        middle = slice(8, -8)  # what comes from inside
        np.testing.assert_allclose(
            sheared[:, middle], (ramp + 2 * shift[:, None])[:, middle], atol=1
        )
        last = sheared[-1, -1 if sign > 0 else 0]
        assert last == FILL["L"], "the last row is shifted most"

    @pytest.mark.parametrize(("level", "sign"), [(0.5, 1), (1.0, 1), (0.5, -1), (1.0, -1)])
    @pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
    def test_enhance(self, image, name, level, sign):
        """The image is moved away from, or towards, one that lacks what is enhanced."""
        grey = image.convert("L")
        lacking = {
            "color": grey.convert(image.mode),
            "contrast": Image.new("L", image.size, round(np.mean(grey))).convert(image.mode),
            "brightness": Image.new(image.mode, image.size),
            "sharpness": image.filter(ImageFilter.SMOOTH),
        }[name]
        factor = {(0.5, 1): 1.45, (1.0, 1): 1.9, (0.5, -1): 0.55, (1.0, -1): 0.1}[level, sign]
        blend = np.asarray(lacking) + factor * (
            np.asarray(image) - np.asarray(lacking).astype(float)
        )
        found = apply(name, image, level, sign)
        np.testing.assert_allclose(found, np.clip(blend, 0, 255), atol=1)


class TestRandAugment:
    def outcomes(self, image, levels):
        """Which operation and sign give which image; operations without a sign have sign 1."""
        return {
            apply(name, image, level, sign).astype(np.uint8).tobytes(): (name, sign)
            for level in levels
            for name in OPERATIONS
            for sign in ((1, -1) if name in SIGNED else (1,))
        }

    def draws(self, image, count, seed=0, **kwargs):
        augment = RandAugment(fill=FILL["RGB"], **kwargs)
        rng = np.random.default_rng(seed)
        return [augment(image, rng).tobytes() for _ in range(count)]

    def test_is_a_function_of_the_rng(self, image):
        augment = RandAugment(fill=FILL["RGB"])
        runs = [
            [augment(image, rng) for _ in range(20)]
            for rng in (np.random.default_rng(seed) for seed in (1, 1, 2))
        ]
        for one, same in zip(*runs[:2]):
            assert_image(one, same)
            assert (one.mode, one.size) == (image.mode, image.size)
        assert any(one.tobytes() != other.tobytes() for one, other in zip(*runs[1:]))

    def test_operations_and_signs_are_equally_frequent(self):
        image = noise_image(size=(20, 16), low=10, high=200)
        outcomes = self.outcomes(image, [0.9])
        assert len(outcomes) == 15 + len(SIGNED), "all are different images"
        drawn = self.draws(image, 3000, std=0.0, layers=1, prob=1.0)
        found = [outcomes[pixels] for pixels in drawn]
        for name in OPERATIONS:
            signs = [sign for other, sign in found if other == name]
            assert 140 < len(signs) < 260
            if name in SIGNED:
                assert 0.33 < np.mean(np.array(signs) > 0) < 0.67

    @pytest.mark.parametrize(
        ("layers", "prob", "unchanged"), [(1, 0.5, 0.5), (2, 0.5, 0.25), (2, 0.0, 1), (1, 1.0, 0)]
    )
    def test_layers_are_skipped(self, layers, prob, unchanged):
        image = noise_image(size=(20, 16), low=10, high=200)
        drawn = self.draws(image, 1000, std=0.0, layers=layers, prob=prob)
        share = np.mean([pixels == image.tobytes() for pixels in drawn])
        assert share == pytest.approx(unchanged, abs=0.06 if 0 < unchanged < 1 else 0.005)

    @pytest.mark.parametrize("mode", FILL)
    def test_outside_has_the_colour_of_fill(self, mode):
        augment = RandAugment(fill=FILL["RGB"], std=0.0, layers=1, prob=1.0)
        rng, black = np.random.default_rng(0), Image.new(mode, (20, 20))
        assert FILL[mode] in {augment(black, rng).getpixel((0, 0)) for _ in range(100)}

    def test_magnitudes_are_clipped(self):
        image = noise_image(size=(20, 16), low=10, high=200)
        outcomes = self.outcomes(image, [0.0, 1.0])
        assert set(self.draws(image, 1000, std=1e9, layers=1, prob=1.0)) == set(outcomes)

    def test_magnitudes_are_normal(self):
        """Of black with a black outside, solarize_add alone makes greys: 110 times the level."""
        augment = RandAugment(fill=(0,), magnitude=6.0, std=0.8, layers=1, prob=1.0)
        rng, black = np.random.default_rng(0), Image.new("L", (2, 2))
        values = np.array([np.asarray(augment(black, rng))[0, 0] for _ in range(9000)])
        greys = values[(values > 0) & (values < 255)]
        assert greys.mean() == pytest.approx(66 - 0.5, abs=1.5)  # .5: cut to whole numbers
        assert greys.std() == pytest.approx(8.8, abs=1)

    @pytest.mark.parametrize(
        ("name", "value"), [("magnitude", -0.1), ("magnitude", 10.5), ("std", -0.1), ("layers", -1)]
    )
    def test_bad_values_are_named(self, name, value):
        with pytest.raises(ValueError, match=f"randaugment_{name}={value}"):
            RandAugment(fill=FILL["RGB"], **{name: value})


class TestWeakCrop:
    @pytest.fixture
    def recorded(self, golden):
        return np.load(golden / "crop" / "mae_500x375_s0.08.npz")

    def test_sides_are_the_references(self, recorded):
        for share, aspect, _, _, h, w in recorded["cases_scale_aspect_ijhw"]:
            sides = crop_sides(share, aspect, (375, 500))
            assert (min(sides[0], 375), min(sides[1], 500)) == (h, w)

    def distances(self, law, recorded):
        """How far the shares of draws below the recorded quantiles are from these' levels."""
        rng = np.random.default_rng(0)
        boxes = np.array([law(rng, (375, 500), (0.08, 1.0)) for _ in range(20_000)])
        left, top, right, lower = boxes.T
        h, w = lower - top, right - left
        drawn = dict(h=h, w=w, i=top, j=left, area=h * w / (375 * 500), aspect_w_over_h=w / h)
        level, found = recorded["quantile_levels"], {}
        for name, values in drawn.items():
            quantile = recorded[f"{name}_quantiles"]
            slack = 1e-6 * quantile  # they were rounded
            below = (values[:, None] < quantile - slack).mean(axis=0)
            up_to = (values[:, None] <= quantile + slack).mean(axis=0)
            found[name] = np.maximum(below - level, level - up_to).max()
        return found, (h == 375).mean()

    def test_law_is_the_references(self, recorded):
        distances, whole_height = self.distances(single_try_crop_box, recorded)
        assert max(distances.values()) < 0.015, distances
        assert whole_height == pytest.approx(0.262, abs=0.012)

    def test_torchvisions_law_is_another(self, recorded):
        distances, whole_height = self.distances(random_crop_box, recorded)
        assert distances["h"] > 0.05
        assert distances["area"] > 0.05
        assert whole_height < 0.05

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
    def test_lies_within_any_image(self, size):
        rng = np.random.default_rng(0)
        for _ in range(200):
            left, top, right, lower = single_try_crop_box(rng, size, (0.01, 1.0))
            assert 0 <= left < right <= size[1]
            assert 0 <= top < lower <= size[0]


@pytest.mark.parametrize("law", [random_crop_box, single_try_crop_box])
def test_places_of_a_crop_are_equally_likely(law):
    """A quarter of 4x4 pixels is always 2x2 of them."""
    rng = np.random.default_rng(0)
    count = Counter(law(rng, (4, 4), (0.25, 0.25)) for _ in range(4500))
    assert set(count) == {(x, y, x + 2, y + 2) for x in range(3) for y in range(3)}
    assert max(abs(n - 500) for n in count.values()) < 90


class TestTransform:
    @pytest.fixture(params=[1, 3])
    def channels(self, request):
        return request.param

    def make(self, law, channels, **kwargs):
        augment = RandAugment(fill=FILL["RGB"][:channels]) if law == "randaugment" else None
        return TrainTransform(
            (16, 24), channels, (0.2, 1.0), weak=law == "weak_crop", augment=augment, **kwargs
        )

    def encoded(self, image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    @pytest.mark.parametrize("law", LAWS)
    def test_is_a_function_of_the_rng(self, law, channels):
        transform, data = self.make(law, channels), self.encoded(noise_image())
        runs = []
        for seed in (1, 1, 2):
            rng = np.random.default_rng(seed)
            runs.append(np.stack([transform(data, rng)["image"] for _ in range(8)]))
        assert runs[0].shape == (8, 16, 24, channels)
        assert runs[0].dtype == np.uint8
        np.testing.assert_array_equal(runs[0], runs[1])
        assert (runs[0] != runs[2]).any(axis=(1, 2, 3)).all()

    @pytest.mark.parametrize("law", LAWS)
    def test_crops_by_its_law_and_then_augments(self, law, channels):
        image = noise_image("RGB" if channels == 3 else "L")
        transform, data = self.make(law, channels, flip=False), self.encoded(image)
        for seed in range(10):
            rng = np.random.default_rng(seed)
            expected = image.crop(LAWS[law](rng, (40, 80), (0.2, 1.0))).resize((24, 16), BICUBIC)
            if law == "randaugment":
                expected = transform.augment(expected, rng)
            found = transform(data, np.random.default_rng(seed))["image"]
            assert_image(found, np.asarray(expected).reshape(16, 24, channels))
