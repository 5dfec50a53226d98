"""RandAugment: what each operation does to pixels, and how operations are sampled."""

import math

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from mae_jax.data.randaugment import BICUBIC, OPERATIONS, OpParams, RandAugment
from mae_jax.utils.errors import UserError

FILL = {"RGB": (124, 116, 104), "L": 124}
SIGNED = {"rotate", "color", "contrast", "brightness", "sharpness"}
SIGNED |= {"shear_x", "shear_y", "translate_x", "translate_y"}


def random_image(mode="RGB", size=(80, 40), low=0, high=256):
    """Return an image of random values in [low, high); size is width, height."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(0).integers(low, high, shape, dtype=np.uint8))


def apply(name, image, level=1.0, sign=1):
    output = OPERATIONS[name](image, OpParams(level, sign, FILL[image.mode]))
    assert (output.mode, output.size) == (image.mode, image.size)
    return np.asarray(output).astype(int)


def assert_image(actual, expected):
    np.testing.assert_array_equal(actual, np.asarray(expected))


@pytest.fixture(params=["RGB", "L"])
def image(request):
    return random_image(request.param)


class TestOperations:
    @pytest.mark.parametrize("name", OPERATIONS)
    def test_sign_matters_for_signed_operations(self, name, image):
        plus, minus = (apply(name, image, 0.7, sign) for sign in (1, -1))
        no_colors = name == "color" and image.mode == "L"
        assert (plus != minus).any() == (name in SIGNED and not no_colors)

    @pytest.mark.parametrize("name", sorted(SIGNED | {"solarize", "solarize_add"}))
    def test_level_0_is_the_identity(self, name, image):
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
    def test_posterize(self, image, level, bits):
        step = 2 ** (8 - bits)
        expected = np.asarray(image).astype(int) // step * step
        assert_image(apply("posterize", image, level), expected)

    @pytest.mark.parametrize(("level", "threshold"), [(0.25, 192), (0.9, 26), (1.0, 0)])
    def test_solarize(self, image, level, threshold):
        before = np.asarray(image)
        expected = np.where(before < threshold, before, 255 - before)
        assert_image(apply("solarize", image, level), expected)

    @pytest.mark.parametrize(("level", "added"), [(0.5, 55), (0.9, 99), (1.0, 110)])
    def test_solarize_add(self, image, level, added):
        before = np.asarray(image).astype(int)
        expected = np.where(before < 128, before + added, before)
        assert_image(apply("solarize_add", image, level), expected)

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize(("level", "degrees"), [(0.1, 3), (0.5, 15), (1.0, 30)])
    def test_rotate(self, image, level, degrees, sign):
        expected = image.rotate(sign * degrees, resample=BICUBIC, fillcolor=FILL[image.mode])
        assert_image(apply("rotate", image, level, sign), expected)

    @pytest.mark.parametrize("sign", [1, -1])
    def test_positive_sign_rotates_counterclockwise(self, sign):
        black = Image.new("L", (41, 41))
        black.paste(255, (34, 18, 39, 23))  # 16 pixels right of the center
        row, column = np.argwhere(apply("rotate", black, 1.0, sign) == 255).mean(axis=0)
        assert abs(row - (20 - sign * 16 * math.sin(math.pi / 6))) < 0.5
        assert abs(column - (20 + 16 * math.cos(math.pi / 6))) < 0.5

    @pytest.mark.parametrize("level", [0.5, 1.0])
    @pytest.mark.parametrize("axis", [0, 1])
    def test_translate(self, image, axis, level):
        """A positive sign shifts left or up, by up to 0.45 of the width (80) or height (40)."""
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
        """Shearing a linear ramp adds a ramp along the other axis."""
        ramp = np.tile(np.arange(40, 200, 2, dtype=np.uint8), (20, 1))
        image = Image.fromarray(ramp if axis == 1 else ramp.T)
        sheared = apply(("shear_y", "shear_x")[axis], image, level, sign)
        sheared = sheared if axis == 1 else sheared.T
        shift = sign * level * 0.3 * (np.arange(20) + 0.5)
        middle = slice(8, -8)  # pixels from inside the image
        np.testing.assert_allclose(
            sheared[:, middle], (ramp + 2 * shift[:, None])[:, middle], atol=1
        )
        last = sheared[-1, -1 if sign > 0 else 0]
        assert last == FILL["L"], "the last row is shifted the most"

    @pytest.mark.parametrize(("level", "sign"), [(0.5, 1), (1.0, 1), (0.5, -1), (1.0, -1)])
    @pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
    def test_enhance(self, image, name, level, sign):
        """Extrapolates from, or interpolates to, an image without the enhanced property."""
        gray = image.convert("L")
        baseline = {
            "color": gray.convert(image.mode),
            "contrast": Image.new("L", image.size, round(np.mean(gray))).convert(image.mode),
            "brightness": Image.new(image.mode, image.size),
            "sharpness": image.filter(ImageFilter.SMOOTH),
        }[name]
        factor = {(0.5, 1): 1.45, (1.0, 1): 1.9, (0.5, -1): 0.55, (1.0, -1): 0.1}[level, sign]
        baseline = np.asarray(baseline).astype(float)
        expected = baseline + factor * (np.asarray(image) - baseline)
        actual = apply(name, image, level, sign)
        np.testing.assert_allclose(actual, np.clip(expected, 0, 255), atol=1)


class TestRandAugment:
    def outcomes(self, image, levels):
        """Map each output to its (operation, sign); unsigned operations have sign 1."""
        return {
            apply(name, image, level, sign).astype(np.uint8).tobytes(): (name, sign)
            for level in levels
            for name in OPERATIONS
            for sign in ((1, -1) if name in SIGNED else (1,))
        }

    def sample(self, image, count, seed=0, **kwargs):
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

    def test_operations_and_signs_are_uniform(self):
        image = random_image(size=(20, 16), low=10, high=200)
        outcomes = self.outcomes(image, [0.9])
        assert len(outcomes) == 15 + len(SIGNED), "all outputs differ"
        samples = self.sample(image, 3000, std=0.0, layers=1, prob=1.0)
        applied = [outcomes[pixels] for pixels in samples]
        for name in OPERATIONS:
            signs = [sign for other, sign in applied if other == name]
            assert 140 < len(signs) < 260
            if name in SIGNED:
                assert 0.33 < np.mean(np.array(signs) > 0) < 0.67

    @pytest.mark.parametrize(
        ("layers", "prob", "unchanged"), [(1, 0.5, 0.5), (2, 0.5, 0.25), (2, 0.0, 1), (1, 1.0, 0)]
    )
    def test_layers_are_skipped_with_their_probability(self, layers, prob, unchanged):
        image = random_image(size=(20, 16), low=10, high=200)
        samples = self.sample(image, 1000, std=0.0, layers=layers, prob=prob)
        fraction = np.mean([pixels == image.tobytes() for pixels in samples])
        assert fraction == pytest.approx(unchanged, abs=0.06 if 0 < unchanged < 1 else 0.005)

    @pytest.mark.parametrize("mode", FILL)
    def test_pixels_outside_have_the_fill_color(self, mode):
        augment = RandAugment(fill=FILL["RGB"], std=0.0, layers=1, prob=1.0)
        rng, black = np.random.default_rng(0), Image.new(mode, (20, 20))
        assert FILL[mode] in {augment(black, rng).getpixel((0, 0)) for _ in range(100)}

    def test_magnitudes_are_clipped(self):
        image = random_image(size=(20, 16), low=10, high=200)
        outcomes = self.outcomes(image, [0.0, 1.0])
        assert set(self.sample(image, 1000, std=1e9, layers=1, prob=1.0)) == set(outcomes)

    def test_magnitudes_are_normally_distributed(self):
        """On black with black fill only solarize_add gives gray: 110 times the level."""
        augment = RandAugment(fill=(0,), magnitude=6.0, std=0.8, layers=1, prob=1.0)
        rng, black = np.random.default_rng(0), Image.new("L", (2, 2))
        values = np.array([np.asarray(augment(black, rng))[0, 0] for _ in range(9000)])
        grays = values[(values > 0) & (values < 255)]
        assert grays.mean() == pytest.approx(66 - 0.5, abs=1.5)  # 0.5: truncated to integers
        assert grays.std() == pytest.approx(8.8, abs=1)

    @pytest.mark.parametrize(
        ("name", "value"), [("magnitude", -0.1), ("magnitude", 10.5), ("std", -0.1), ("layers", -1)]
    )
    def test_out_of_range_values_are_user_errors(self, name, value):
        with pytest.raises(UserError, match=f"^data.randaugment_{name}={value} must be "):
            RandAugment(fill=FILL["RGB"], **{name: value})
