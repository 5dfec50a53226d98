"""Random and center crops, flips and resizing, compared with torchvision and Pillow."""

import tracemalloc
from collections import Counter

import numpy as np
import pytest
from image_helpers import encoded, noise_image, photograph
from PIL import Image

from mae_jax.data.randaugment import RandAugment
from mae_jax.data.transforms import (
    EvalTransform,
    TrainTransform,
    crop_size,
    random_crop_box,
    resize,
    single_try_crop_box,
)

CROPS = {"crop": random_crop_box, "weak_crop": single_try_crop_box, "randaugment": random_crop_box}


class TestRandomCrop:
    def test_distribution_equals_torchvision(self, golden):
        """Marginals of 10,000 crops of a 500x375 image."""
        torchvision = np.load(golden / "crop" / "torchvision_500x375_s0.2.npy")
        rng = np.random.default_rng(0)
        boxes = np.array([random_crop_box(rng, (375, 500), (0.2, 1.0)) for _ in range(10_000)])
        left, top, right, lower = boxes.T
        for samples in zip((top, left, lower - top, right - left), torchvision.T):
            grid = np.union1d(*samples)
            ours, theirs = (np.searchsorted(np.sort(x), grid, "right") / len(x) for x in samples)
            assert np.abs(ours - theirs).max() < 0.03, "Kolmogorov-Smirnov distance"

    def test_falls_back_to_the_center(self):
        rng = np.random.default_rng(0)
        boxes = {random_crop_box(rng, (10, 1000), (1.0, 1.0)) for _ in range(5)}
        assert boxes == {(493, 0, 506, 10)}


class TestSingleTryCrop:
    @pytest.fixture
    def official(self, golden):
        """Samples of the official code: sizes, quantiles of 500x375 crops."""
        return np.load(golden / "crop" / "mae_500x375_s0.08.npz")

    def test_sizes_equal_the_official_code(self, official):
        for area_fraction, aspect, _, _, h, w in official["cases_scale_aspect_ijhw"]:
            size = crop_size(area_fraction, aspect, (375, 500))
            assert (min(size[0], 375), min(size[1], 500)) == (h, w)

    def distances(self, sample_box, official):
        """Return the distance of each CDF from the official quantiles, and P(full height)."""
        rng = np.random.default_rng(0)
        boxes = np.array([sample_box(rng, (375, 500), (0.08, 1.0)) for _ in range(20_000)])
        left, top, right, lower = boxes.T
        h, w = lower - top, right - left
        samples = dict(h=h, w=w, i=top, j=left, area=h * w / (375 * 500), aspect_w_over_h=w / h)
        level, distances = official["quantile_levels"], {}
        for name, values in samples.items():
            quantile = official[f"{name}_quantiles"]
            slack = 1e-6 * quantile  # the quantiles are rounded
            below = (values[:, None] < quantile - slack).mean(axis=0)
            up_to = (values[:, None] <= quantile + slack).mean(axis=0)
            distances[name] = np.maximum(below - level, level - up_to).max()
        return distances, (h == 375).mean()

    def test_distribution_equals_the_official_code(self, official):
        distances, full_height = self.distances(single_try_crop_box, official)
        assert max(distances.values()) < 0.015, distances
        assert full_height == pytest.approx(0.262, abs=0.012)

    def test_distribution_differs_from_torchvision(self, official):
        distances, full_height = self.distances(random_crop_box, official)
        assert distances["h"] > 0.05
        assert distances["area"] > 0.05
        assert full_height < 0.05

    @pytest.mark.parametrize("size", [(1, 1), (2, 300), (300, 2)])
    def test_box_is_inside_the_image(self, size):
        rng = np.random.default_rng(0)
        for _ in range(200):
            left, top, right, lower = single_try_crop_box(rng, size, (0.01, 1.0))
            assert 0 <= left < right <= size[1]
            assert 0 <= top < lower <= size[0]


@pytest.mark.parametrize("sample_box", [random_crop_box, single_try_crop_box])
def test_crop_positions_are_uniform(sample_box):
    """A quarter of 4x4 pixels is always 2x2 pixels."""
    rng = np.random.default_rng(0)
    count = Counter(sample_box(rng, (4, 4), (0.25, 0.25)) for _ in range(4500))
    assert set(count) == {(x, y, x + 2, y + 2) for x in range(3) for y in range(3)}
    assert max(abs(n - 500) for n in count.values()) < 90


class TestAugmentations:
    @pytest.fixture(params=[1, 3])
    def channels(self, request):
        return request.param

    def make(self, augment, channels, **kwargs):
        randaugment = (
            RandAugment(fill=(124, 116, 104)[:channels]) if augment == "randaugment" else None
        )
        weak = augment == "weak_crop"
        return TrainTransform(
            (16, 24), channels, (0.2, 1.0), weak=weak, augment=randaugment, **kwargs
        )

    @pytest.mark.parametrize("augment", CROPS)
    def test_is_a_function_of_the_rng(self, augment, channels):
        transform, data = self.make(augment, channels), encoded(noise_image(0, (40, 80)))
        runs = []
        for seed in (1, 1, 2):
            rng = np.random.default_rng(seed)
            runs.append(np.stack([transform(data, rng)["image"] for _ in range(8)]))
        assert runs[0].shape == (8, 16, 24, channels)
        assert runs[0].dtype == np.uint8
        np.testing.assert_array_equal(runs[0], runs[1])
        assert (runs[0] != runs[2]).any(axis=(1, 2, 3)).all()

    @pytest.mark.parametrize("augment", CROPS)
    def test_crops_resizes_and_then_augments(self, augment, channels):
        image = noise_image(0, (40, 80)).convert("RGB" if channels == 3 else "L")
        transform, data = self.make(augment, channels, flip=False), encoded(image)
        for seed in range(10):
            rng = np.random.default_rng(seed)
            box = CROPS[augment](rng, (40, 80), (0.2, 1.0))
            expected = image.crop(box).resize((24, 16), Image.Resampling.BICUBIC)
            if augment == "randaugment":
                expected = transform.augment(expected, rng)
            actual = transform(data, np.random.default_rng(seed))["image"]
            np.testing.assert_array_equal(actual, np.asarray(expected).reshape(16, 24, channels))


class TestTrainTransform:
    def test_is_a_function_of_the_seed(self):
        image = encoded(noise_image(1, (40, 50)))
        transform = TrainTransform((16, 24), 3, (0.2, 1.0))
        first, same, other = (
            transform(image, np.random.default_rng(seed))["image"] for seed in (1, 1, 2)
        )
        assert first.shape == (16, 24, 3)
        assert first.dtype == np.uint8
        np.testing.assert_array_equal(first, same)
        assert (first != other).any()

    def test_flip_probability(self):
        ramp = encoded(Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1))))
        rng = np.random.default_rng(0)

        def flipped(transform, count):
            images = [transform(ramp, rng)["image"] for _ in range(count)]
            return sum(bool(image[0, 0, 0] > image[0, -1, 0]) for image in images)

        assert 70 < flipped(TrainTransform((8, 8), 1, (1.0, 1.0)), 200) < 130
        assert flipped(TrainTransform((8, 8), 1, (1.0, 1.0), flip=False), 20) == 0


class TestEvalTransform:
    @pytest.mark.parametrize(
        ("size", "resized", "left"),  # as torchvision rounds them; (300, 400) is exact
        [
            ((300, 400), (341, 256), 58),
            ((332, 500), (385, 256), 80),
            ((334, 500), (383, 256), 80),
            ((281, 500), (455, 256), 116),
        ],
    )
    def test_resize_256_crop_224_rounds_as_torchvision(self, size, resized, left):
        transform = EvalTransform((224, 224), 3)
        landscape = noise_image(2, size)
        expected = landscape.resize(resized, Image.Resampling.BICUBIC)
        expected = expected.crop((left, 16, left + 224, 240))
        np.testing.assert_array_equal(transform(encoded(landscape))["image"], np.asarray(expected))
        portrait = noise_image(2, size[::-1])
        expected = portrait.resize(resized[::-1], Image.Resampling.BICUBIC)
        expected = expected.crop((16, left, 240, left + 224))
        np.testing.assert_array_equal(transform(encoded(portrait))["image"], np.asarray(expected))

    def test_extreme_aspect_ratio_uses_little_memory(self):
        image = encoded(noise_image(0, (2, 20_000)))
        tracemalloc.start()
        try:
            assert EvalTransform((224, 224), 3)(image)["image"].shape == (224, 224, 3)
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()

    def test_extreme_aspect_ratio_of_the_model_is_not_trimmed(self):
        image = np.random.default_rng(0).integers(0, 256, (16, 512, 3), dtype=np.uint8)
        pixels = EvalTransform((16, 512), 3, crop=1.0)(image)["image"]
        np.testing.assert_array_equal(pixels, image)


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_output_shape_for_any_image_size(size, channels):
    data = encoded(noise_image(0, size))
    for transform in (
        EvalTransform((32, 48), channels, 1.0),
        TrainTransform((32, 48), channels, (0.2, 1.0)),
    ):
        assert transform(data, np.random.default_rng(0))["image"].shape == (32, 48, channels)


class TestResize:
    @pytest.mark.parametrize("mode", ["RGB", "L"])
    def test_equals_pillow_for_rgb_and_gray(self, mode):
        image = noise_image(0, (40, 50)).convert(mode)
        expected = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))
        resized = resize(np.asarray(image).reshape(40, 50, -1), (16, 24))
        np.testing.assert_array_equal(resized, expected.reshape(16, 24, -1))

    def test_channels_are_independent(self):
        image = np.asarray(noise_image(0, (40, 50)))
        six_channels = np.concatenate([image, image[..., ::-1]], axis=-1)
        expected = resize(image, (16, 24))
        resized = resize(six_channels, (16, 24))
        np.testing.assert_array_equal(resized, np.concatenate([expected, expected[..., ::-1]], -1))

    @pytest.mark.parametrize("dtype", [np.uint16, np.float32])
    def test_other_dtypes(self, dtype):
        image = np.asarray(photograph())
        resized = resize(image.astype(dtype) * 200, (16, 24))
        assert resized.dtype == dtype
        as_uint8 = resize(image, (16, 24)).astype(float)
        unclipped = (as_uint8 > 0) & (as_uint8 < 255)
        np.testing.assert_allclose(resized[unclipped] / 200, as_uint8[unclipped], atol=1.01)

    def test_overshoot_is_clipped_for_uint16(self):
        edge = np.repeat(np.array([0, 65535], np.uint16), 8)[None, :, None].repeat(16, axis=0)
        resized = resize(edge, (24, 24))
        assert (resized[:, 0] == 0).all()
        assert (resized[:, -1] == 65535).all()
        assert (np.diff(resized[0, :, 0].astype(int)) >= 0).all(), "no wrap-around"
