"""Random and center crops, flips and resizing, compared with torchvision and Pillow."""

import tracemalloc

import numpy as np
import pytest
from image_helpers import encoded, noise_image, photograph
from PIL import Image

from mae_jax.data.transforms import EvalTransform, TrainTransform, random_crop_box, resize


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

    def test_squash_resizes_the_full_image(self):
        image = noise_image(2, (30, 90))
        pixels = EvalTransform((16, 24), 3, squash=True, interpolation="bilinear")(encoded(image))
        expected = image.resize((24, 16), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(pixels["image"], np.asarray(expected))

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
