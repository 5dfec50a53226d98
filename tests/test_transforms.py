"""Crops, flips and resizing."""

import tracemalloc

import numpy as np
import pytest
from image_helpers import encoded, noise_image, photograph
from PIL import Image

from mae_jax.data.transforms import EvalTransform, TrainTransform, random_crop_box, resize


class TestTransforms:
    def test_crop_is_torchvisions(self, golden):
        """The marginals of 10,000 crops of a 500x375 image against torchvision's."""
        drawn = np.load(golden / "crop" / "torchvision_500x375_s0.2.npy")
        rng = np.random.default_rng(0)
        boxes = np.array([random_crop_box(rng, (375, 500), (0.2, 1.0)) for _ in range(10_000)])
        left, top, right, lower = boxes.T
        for ours, theirs in zip((top, left, lower - top, right - left), drawn.T):
            grid = np.union1d(ours, theirs)
            cdf = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (ours, theirs)]
            assert np.abs(cdf[0] - cdf[1]).max() < 0.03, "Kolmogorov-Smirnov distance"

    def test_crop_of_a_sliver_falls_back_to_its_centre(self):
        rng = np.random.default_rng(0)
        boxes = {random_crop_box(rng, (10, 1000), (1.0, 1.0)) for _ in range(5)}
        assert boxes == {(493, 0, 506, 10)}

    def test_train_transform(self):
        image = noise_image(1, (40, 50))
        transform = TrainTransform((16, 24), 3, (0.2, 1.0))
        one, same, other = (
            transform(encoded(image), np.random.default_rng(seed))["image"] for seed in (1, 1, 2)
        )
        assert one.shape == (16, 24, 3)
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(one, same)
        assert (one != other).any()

    def test_flips_half_of_the_images(self):
        ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
        transform = TrainTransform((8, 8), 1, (1.0, 1.0))
        rng = np.random.default_rng(0)
        flipped = [
            bool(x[0, 0, 0] > x[0, -1, 0])
            for x in (transform(encoded(ramp), rng)["image"] for _ in range(200))
        ]
        assert 70 < sum(flipped) < 130
        upright = TrainTransform((8, 8), 1, (1.0, 1.0), flip=False)
        assert all(
            x[0, 0, 0] < x[0, -1, 0]
            for x in (upright(encoded(ramp), rng)["image"] for _ in range(20))
        )

    def test_eval_transform_is_resize_256_crop_224(self):
        image = noise_image(2, (300, 400))
        expected = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
        ours = EvalTransform((224, 224), 3)(encoded(image))["image"]
        np.testing.assert_array_equal(ours, np.asarray(expected))

    @pytest.mark.parametrize(
        ("size", "resized", "left"),  # torchvision's, where something has to be rounded
        [((332, 500), (385, 256), 80), ((334, 500), (383, 256), 80), ((281, 500), (455, 256), 116)],
    )
    def test_eval_transform_rounds_as_torchvision(self, size, resized, left):
        image, transform = noise_image(2, size), EvalTransform((224, 224), 3)
        across = image.resize(resized, Image.Resampling.BICUBIC)
        expected = across.crop((left, 16, left + 224, 240))
        np.testing.assert_array_equal(transform(encoded(image))["image"], np.asarray(expected))
        image = noise_image(2, size[::-1])
        upright = image.resize(resized[::-1], Image.Resampling.BICUBIC)
        expected = upright.crop((16, left, 240, left + 224))
        np.testing.assert_array_equal(transform(encoded(image))["image"], np.asarray(expected))

    @pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (64, 64)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_shape_of_image(self, size, channels):
        data = encoded(noise_image(0, size))
        for transform in (
            EvalTransform((32, 48), channels, 1.0),
            TrainTransform((32, 48), channels, (0.2, 1.0)),
        ):
            assert transform(data, np.random.default_rng(0))["image"].shape == (32, 48, channels)

    def test_a_sliver_does_not_fill_the_memory(self):
        image = encoded(noise_image(0, (2, 20_000)))
        tracemalloc.start()
        assert EvalTransform((224, 224), 3)(image)["image"].shape == (224, 224, 3)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()

    def test_a_model_of_slivers_sees_all_of_one(self):
        image = np.random.default_rng(0).integers(0, 256, (16, 512, 3), dtype=np.uint8)
        found = EvalTransform((16, 512), 3, crop=1.0)(image)["image"]
        np.testing.assert_array_equal(found, image)


class TestResize:
    def test_is_pillow_for_pictures(self):
        image = noise_image(0, (40, 50))
        expected = image.resize((24, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(resize(np.asarray(image), (16, 24)), np.asarray(expected))
        grey = image.convert("L")
        found = resize(np.asarray(grey)[..., None], (16, 24))
        expected = grey.resize((24, 16), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[..., 0], np.asarray(expected))

    def test_channels_do_not_meet(self):
        image = np.asarray(noise_image(0, (40, 50)))
        many = np.concatenate([image, image[..., ::-1]], axis=-1)
        expected = resize(image, (16, 24))
        found = resize(many, (16, 24))
        np.testing.assert_array_equal(found, np.concatenate([expected, expected[..., ::-1]], -1))

    @pytest.mark.parametrize("dtype", [np.uint16, np.float32])
    def test_of_other_types(self, dtype):
        image = np.asarray(photograph())
        found = resize(image.astype(dtype) * 200, (16, 24))
        assert found.dtype == dtype
        inner = resize(image, (16, 24)).astype(float)
        unclipped = (inner > 0) & (inner < 255)
        np.testing.assert_allclose(found[unclipped] / 200, inner[unclipped], atol=1.01)
