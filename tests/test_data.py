"""Sources, transforms and the loader, on real files."""

import io
import itertools

import numpy as np
import pytest
from PIL import Image

from mae_jax.data.loader import ArrayLoader, Loader, ordered_batches
from mae_jax.data.sources import DataError, FolderSource, TfdsSource, make_source
from mae_jax.data.subsets import draw_shots, evenly_spaced
from mae_jax.data.transforms import EvalTransform, TrainTransform, decode, random_crop_box


def noise_image(seed, size=(20, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten images, a file that is no image, and a hidden one."""
    for label, name in enumerate(["zebra", "ant"]):
        (tmp_path / name).mkdir()
        for i in range(10):
            noise_image(100 * label + i).save(tmp_path / name / f"{i}.png")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / "ant" / ".hidden.png").write_bytes(b"")
    return tmp_path


def make_loader(folder, **kwargs):
    source = FolderSource(str(folder), "train")
    transform = TrainTransform((8, 8), 3, (0.2, 1.0))
    return Loader(source=source, transform=transform, **(dict(seed=3, batch_size=4) | kwargs))


def take(loader, count, start=0):
    batches = loader.batches(start)
    taken = list(itertools.islice(batches, count))
    batches.close()
    return taken


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


class TestFolder:
    def test_classes_are_sorted_folders(self, folder):
        source = FolderSource(str(folder), "train")
        assert len(source) == 20
        assert source.classes == ("ant", "zebra")
        assert source[0]["label"] == 0
        assert source[19]["key"] == str(folder / "zebra" / "9.png")

    def test_a_flat_folder_has_no_labels(self, folder):
        source = FolderSource(str(folder / "ant"), "train")
        assert source.classes == ()
        assert source[3]["label"] == -1

    def test_a_subfolder_named_like_the_split_is_read(self, folder):
        (folder / "train").mkdir()
        noise_image(0).save(folder / "train" / "only.png")
        assert len(FolderSource(str(folder), "train")) == 1

    def test_links_are_followed_but_not_in_circles(self, folder):
        (folder / "ant" / "up").symlink_to(folder)
        (folder / "ant" / "linked.png").symlink_to(folder / "zebra" / "1.png")
        (folder / "ant" / "dangling.png").symlink_to(folder / "nowhere.png")
        assert len(FolderSource(str(folder / "ant"), "train")) == 11 + 10

    def test_fingerprint_sees_added_and_resized_files(self, folder):
        before = FolderSource(str(folder), "train").fingerprint()
        assert FolderSource(str(folder), "train").fingerprint() == before
        noise_image(0, (30, 30)).save(folder / "ant" / "0.png")
        resized = FolderSource(str(folder), "train").fingerprint()
        noise_image(0).save(folder / "ant" / "new.png")
        assert len({before, resized, FolderSource(str(folder), "train").fingerprint()}) == 3

    def test_missing_and_empty_folders_are_named(self, tmp_path):
        with pytest.raises(DataError, match="nowhere"):
            FolderSource(str(tmp_path / "nowhere"), "train")
        with pytest.raises(DataError, match=f"no images in {tmp_path}"):
            FolderSource(str(tmp_path), "train")

    def test_subset_is_evenly_spaced(self, folder):
        source = FolderSource(str(folder), "train")
        subset = evenly_spaced(source, 3)
        assert [subset.key(i) for i in range(3)] == [source.key(i) for i in (0, 10, 19)]
        assert len(evenly_spaced(source, 1000)) == 20


class TestTfds:
    def test_embedded_data_set(self, photo_crops):
        train, test = (TfdsSource("photo_crops", s, photo_crops) for s in ("train", "test"))
        assert len(train) == 19 * 400
        assert len(test) == 19 * 80
        assert len(train.classes) == 19
        labels = [train[i]["label"] for i in range(0, len(train), 40)]
        assert set(labels) == set(range(19)), "array_record is shuffled and labelled"
        assert min(decode(train[0]["image"], 3).size) >= 64
        assert train.fingerprint() != test.fingerprint()
        assert TfdsSource("photo_crops", "train[:50%]", photo_crops).__len__() == 19 * 200

    def test_tensorflow_is_not_imported(self, photo_crops):
        import sys

        TfdsSource("photo_crops", "test", photo_crops)[0]
        assert "tensorflow" not in sys.modules

    def test_train_and_test_crops_do_not_share_pixels(self):
        from mae_jax.data import embedded

        image = embedded.photograph("cat")
        border = round(image.width * embedded.TRAIN_SHARE)
        assert embedded.crops("cat", "train")[0].tobytes()
        for split, (left, right) in {"train": (0, border), "test": (border, image.width)}.items():
            strip = np.asarray(image)[:, left:right]
            colours = {tuple(pixel) for pixel in strip.reshape(-1, 3)}
            for crop in embedded.crops("cat", split)[:20]:
                assert {tuple(p) for p in np.asarray(crop).reshape(-1, 3)} <= colours

    def test_unknown_names_and_splits(self, photo_crops, tmp_path):
        with pytest.raises(DataError, match="no split 'val'; it has train, test"):
            TfdsSource("photo_crops", "val", photo_crops)
        with pytest.raises(DataError, match=r"the split 'test\[:0\]' of photo_crops is empty"):
            TfdsSource("photo_crops", "test[:0]", photo_crops)
        with pytest.raises(DataError, match=r"'test\[:x\]' is no split of photo_crops"):
            TfdsSource("photo_crops", "test[:x]", photo_crops)
        with pytest.raises(DataError, match="knows no data set called 'imagenot'"):
            TfdsSource("imagenot", "train", str(tmp_path))
        with pytest.raises(DataError, match="cifar10 is not prepared in"):
            TfdsSource("cifar10", "train", str(tmp_path))
        with pytest.raises(DataError, match="data.source='web'"):
            make_source("web", None, None, "train")


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
            transform(encoded(image), np.random.default_rng(seed)) for seed in (1, 1, 2)
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
            for x in (transform(encoded(ramp), rng) for _ in range(200))
        ]
        assert 70 < sum(flipped) < 130
        upright = TrainTransform((8, 8), 1, (1.0, 1.0), flip=False)
        assert all(
            x[0, 0, 0] < x[0, -1, 0] for x in (upright(encoded(ramp), rng) for _ in range(20))
        )

    def test_eval_transform_is_resize_256_crop_224(self):
        image = noise_image(2, (300, 400))
        expected = image.resize((341, 256), Image.Resampling.BICUBIC).crop((58, 16, 282, 240))
        ours = EvalTransform((224, 224), 3)(encoded(image))
        np.testing.assert_array_equal(ours, np.asarray(expected))

    @pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (64, 64)])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_any_shape_of_image(self, size, channels):
        data = encoded(noise_image(0, size))
        for transform in (
            EvalTransform((32, 48), channels, 1.0),
            TrainTransform((32, 48), channels, (0.2, 1.0)),
        ):
            assert transform(data, np.random.default_rng(0)).shape == (32, 48, channels)

    @pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "I;16"])
    def test_any_colour_mode(self, mode):
        image = Image.new(mode, (20, 20)) if mode == "I;16" else noise_image(0).convert(mode)
        kind = "JPEG" if mode == "CMYK" else "PNG"
        assert decode(encoded(image, kind), 3).mode == "RGB"

    @pytest.mark.parametrize("data", [b"", b"<html>404</html>", encoded(noise_image(0))[:300]])
    def test_what_is_no_image(self, data):
        with pytest.raises(DataError):
            decode(data, 3)


class TestLoader:
    @pytest.mark.parametrize("kwargs", [dict(threads=4), dict(threads=0), dict(workers=2)], ids=str)
    def test_threads_and_workers_change_nothing(self, folder, kwargs):
        assert_same(take(make_loader(folder), 12), take(make_loader(folder, **kwargs), 12))

    def test_continuing_equals_never_having_stopped(self, folder):
        straight = take(make_loader(folder), 14)
        for start in (3, 5, 11):  # in the middle of an epoch, at its end, epochs later
            assert_same(take(make_loader(folder), 14 - start, start), straight[start:])

    @pytest.mark.parametrize("hosts", [2, 4])
    def test_hosts_share_the_global_batch_row_for_row(self, folder, hosts):
        whole = take(make_loader(folder), 6)
        parts = [take(make_loader(folder, host=h, hosts=hosts), 6) for h in range(hosts)]
        joined = [
            {name: np.concatenate([p[name] for p in step]) for name in step[0]}
            for step in zip(*parts)
        ]
        assert_same(joined, whole)

    def test_every_epoch_is_another_permutation(self, folder):
        index = np.concatenate([batch["index"] for batch in take(make_loader(folder), 10)])
        first, second = index[:20], index[20:]
        assert sorted(first) == sorted(second) == list(range(20))
        assert (first != second).any()

    def test_the_seed_matters(self, folder):
        one, two = (take(make_loader(folder, seed=seed), 2) for seed in (1, 2))
        assert (one[0]["index"] != two[0]["index"]).any()

    def test_a_bad_image_is_named(self, folder):
        bad = folder / "zebra" / "4.png"
        bad.write_bytes(bad.read_bytes()[:100])
        for workers in (0, 2):
            with pytest.raises(DataError, match=r"zebra/4.png is bad: .*data.on_bad=skip"):
                take(make_loader(folder, workers=workers), 6)

    def test_a_skipped_image_is_replaced_and_counted(self, folder, caplog):
        good = take(make_loader(folder), 5)
        bad = folder / "ant" / "9.png"
        number = FolderSource(str(folder), "train").files.index("ant/9.png")
        bad.write_bytes(b"")
        batches = take(make_loader(folder, skip=True), 10)
        for before, after in zip(good, batches):  # all other rows stay as they were
            np.testing.assert_array_equal(before["index"], after["index"])
            same = before["index"] != number
            np.testing.assert_array_equal(before["image"][same], after["image"][same])
        warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
        assert warnings == [f"skipped a bad image (1 so far): {bad}"]

    def test_too_many_bad_images(self, folder):
        for i in range(3):
            (folder / "ant" / f"{i}.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"more than data.max_bad=2 bad images.*ant/"):
            take(make_loader(folder, skip=True, max_bad=2), 5)

    def test_batch_larger_than_the_data(self, folder):
        with pytest.raises(DataError, match="batch_size=32 is larger than the data set of 20"):
            make_loader(folder, batch_size=32)

    def test_ordered_batches_cover_everything_once(self, folder):
        source = FolderSource(str(folder), "train")
        batches = list(ordered_batches(source, EvalTransform((8, 8), 3), 8))
        assert [batch["valid"].sum() for batch in batches] == [8, 8, 4]
        index = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
        np.testing.assert_array_equal(index, np.arange(20))


def test_labels_that_are_no_class_are_named(folder):
    source = FolderSource(str(folder), "train")
    transform = EvalTransform((8, 8), 3)
    with pytest.raises(DataError, match="zebra/0.png has label 1, which is no class from 0 to 0"):
        list(ordered_batches(source, transform, 4, num_classes=1))
    with pytest.raises(DataError, match="has label 1, which is no class from 0 to 0"):
        take(make_loader(folder, num_classes=1), 20)
    assert len(list(ordered_batches(source, transform, 4, num_classes=2))) == 5


def test_arrays_come_in_the_order_of_records(folder):
    arrays = {"number": np.arange(20), "label": np.arange(20) % 3}
    for start in (0, 7):
        records = take(make_loader(folder), 6, start)
        rows = take(ArrayLoader(arrays=arrays, seed=3, batch_size=4), 6, start)
        for record, row in zip(records, rows):
            np.testing.assert_array_equal(row["number"], record["index"])
            np.testing.assert_array_equal(row["label"], record["index"] % 3)


def test_shots_are_drawn_of_classes_only():
    labels = [-1, 0, 1, 5, 0, 1, -1, 1]
    drawn = draw_shots(labels.__getitem__, 8, ("a", "b"), 2, seed=0)
    assert sorted(labels[number] for number in drawn) == [0, 0, 1, 1]
    with pytest.raises(DataError, match="3 shots, but class 'a' has only 2 images"):
        draw_shots(labels.__getitem__, 8, ("a", "b"), 3, seed=0)
