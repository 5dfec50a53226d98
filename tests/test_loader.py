"""Batches as a function of seed and step, whatever reads them."""

import gc
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from image_helpers import fill_folder, noise_image

from mae_jax.data.batches import BufferPool
from mae_jax.data.loader import ArrayLoader, Loader, eval_batches
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.transforms import DeviceResizeTransform, EvalTransform, TrainTransform, resize
from mae_jax.data.worker_processes import WorkerError


@pytest.fixture
def folder(tmp_path):
    return fill_folder(tmp_path)


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


class TestLoader:
    @pytest.mark.parametrize(
        "kwargs", [dict(threads=4), dict(threads=0), dict(workers=1), dict(workers=3)], ids=str
    )
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
        assert warnings == [f"skipped a bad image (1 so far): {bad}: it is empty"]

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
        batches = list(eval_batches(source, EvalTransform((8, 8), 3), 8))
        assert [batch["valid"].sum() for batch in batches] == [8, 8, 4]
        index = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
        np.testing.assert_array_equal(index, np.arange(20))


class TestCanvas:
    """Crops that are resized later."""

    def loader(self, folder, side, **kwargs):
        transform = DeviceResizeTransform(TrainTransform((8, 8), 3, (0.2, 1.0)), side)
        source = FolderSource(str(folder), "train")
        defaults = dict(seed=3, batch_size=4, shapes=transform.shapes)
        return Loader(source=source, transform=transform, **(defaults | kwargs))

    @pytest.mark.parametrize("side", [24, 12])
    def test_are_the_same_crops(self, folder, side):
        """Resized by Pillow they give the batches of the host; large ones are so already."""
        large = 0
        for one, other in zip(take(make_loader(folder), 8), take(self.loader(folder, side), 8)):
            assert other["crop"].shape == (4, side, side, 3)
            for image, canvas, (height, width), flip in zip(
                one["image"], other["crop"], other["crop_size"], other["flip"]
            ):
                crop = resize(canvas[:height, :width], (8, 8))
                np.testing.assert_array_equal(image, crop[:, :: -1 if flip else 1])
                large += (height, width) == (8, 8)
        assert (large > 0) == (side == 12)

    def test_threads_and_workers_change_nothing(self, folder):
        straight = [self.inside(batch) for batch in take(self.loader(folder, 12), 6)]
        for start, kwargs in ((0, dict(workers=2)), (2, dict(threads=5))):
            batches = take(self.loader(folder, 12, **kwargs), 6 - start, start)
            assert_same([self.inside(batch) for batch in batches], straight[start:])

    def inside(self, batch):
        """The batch without what lies beside its crops."""
        crops = np.zeros_like(batch["crop"])
        for row, (height, width) in enumerate(batch["crop_size"]):
            crops[row, :height, :width] = batch["crop"][row, :height, :width]
        return batch | {"crop": crops}


def test_memory_is_used_again_only_when_nobody_holds_it():
    memory = BufferPool()
    first = memory.array((2, 3), np.dtype(np.uint8))
    first[:] = 1
    row = first[1]
    place = first.ctypes.data
    del first
    second = memory.array((2, 3), np.dtype(np.uint8))
    assert second.ctypes.data != place, "its row is still held"
    assert row.tolist() == [1, 1, 1]
    del row
    assert memory.array((6,), np.dtype(np.uint8)).ctypes.data == place


def test_a_killed_worker_is_an_error_and_leaves_nobody_behind(folder):
    batches = make_loader(folder, workers=2).batches(0)
    next(batches)
    before = workers_of(os.getpid())
    assert len(before) == 2
    os.kill(before[0], signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"was killed \(exit code -9\): if memory ran out"):
        list(batches)  # they have no end
    wait_until(lambda: not workers_of(os.getpid()))


def test_closing_does_not_wait_for_workers(tmp_path):
    """Also where they are in the middle of passing large images on."""
    for number in range(8):
        noise_image(number, (300, 300)).save(tmp_path / f"{number}.jpg")
    source = FolderSource(str(tmp_path), "train")
    transform = TrainTransform((224, 224), 3, (0.2, 1.0))
    for _ in range(3):
        gc.collect()  # semaphores of closed loaders: not amid making others (CPython gh-109629)
        loader = Loader(source=source, transform=transform, seed=0, batch_size=8, workers=2)
        batches = loader.batches(0)
        next(batches)
        time.sleep(0.3)  # for what lies ready to be as much as it may
        begin = time.monotonic()
        batches.close()
        assert time.monotonic() - begin < 5
        assert not workers_of(os.getpid())


ORPHANS = """
import sys, time
from test_loader import *

if __name__ == "__main__":
    batches = make_loader(Path(sys.argv[1]), workers=2).batches(0)
    next(batches)
    print(*workers_of(os.getpid()), flush=True)
    time.sleep(600)
"""


def test_workers_do_not_outlive_a_run_that_is_killed(folder, tmp_path_factory):
    script = tmp_path_factory.mktemp("script") / "orphans.py"
    script.write_text(ORPHANS)
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, str(script), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        workers = [int(number) for number in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
    wait_until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def workers_of(parent):
    """Processes that read images, by their number."""
    found = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            command = Path(f"/proc/{child}/cmdline").read_bytes()
            if b"spawn_main" in command:
                found.append(child)
    return found


def test_images_of_several_types_are_an_error(tmp_path):
    for number, kind in enumerate([np.uint8, np.uint8, np.uint16, np.uint8]):
        np.save(tmp_path / f"{number}.npy", np.zeros((9, 9, 2), kind))
    source = FolderSource(str(tmp_path), "train")
    for batch_size in (4, 2):  # within a batch, and from one to the next
        with pytest.raises(DataError, match=r"2.npy has values of uint16 \[8, 8, 2\], and images"):
            list(eval_batches(source, EvalTransform((8, 8), 2), batch_size))


def test_labels_that_are_no_class_are_named(folder):
    source = FolderSource(str(folder), "train")
    transform = EvalTransform((8, 8), 3)
    with pytest.raises(DataError, match="zebra/0.png has label 1, which is no class from 0 to 0"):
        list(eval_batches(source, transform, 4, num_classes=1))
    with pytest.raises(DataError, match="has label 1, which is no class from 0 to 0"):
        take(make_loader(folder, num_classes=1), 20)
    assert len(list(eval_batches(source, transform, 4, num_classes=2))) == 5


def test_arrays_come_in_the_order_of_records(folder):
    arrays = {"number": np.arange(20), "label": np.arange(20) % 3}
    for start in (0, 7):
        records = take(make_loader(folder), 6, start)
        rows = take(ArrayLoader(arrays=arrays, seed=3, batch_size=4), 6, start)
        for record, row in zip(records, rows):
            np.testing.assert_array_equal(row["number"], record["index"])
            np.testing.assert_array_equal(row["label"], record["index"] % 3)
