"""Deterministic batches: threads, worker processes, hosts, resuming; bad images; buffers."""

import gc
import itertools
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from image_helpers import fill_folder, noise_image

from mae_jax.data.collate import BufferPool
from mae_jax.data.loader import ArrayLoader, Loader, eval_batches
from mae_jax.data.sources import DataError, FolderSource
from mae_jax.data.transforms import DeviceResizeTransform, EvalTransform, TrainTransform, resize
from mae_jax.data.worker_processes import PREFETCH, WorkerError

HANG_S = 600  # deadline that only a hang exceeds


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


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


class TestLoader:
    @pytest.mark.parametrize("kwargs", [dict(threads=4), dict(threads=0), dict(workers=2)], ids=str)
    def test_threads_and_workers_do_not_change_batches(self, folder, kwargs):
        assert_equal(take(make_loader(folder), 12), take(make_loader(folder, **kwargs), 12))

    def test_resuming_at_a_step_gives_the_same_batches(self, folder):
        uninterrupted = take(make_loader(folder), 14)
        for start in (3, 5, 11):  # within an epoch, at its end, epochs later
            assert_equal(take(make_loader(folder), 14 - start, start), uninterrupted[start:])

    @pytest.mark.parametrize("hosts", [2, 4])
    def test_hosts_split_the_global_batch_by_rows(self, folder, hosts):
        global_batches = take(make_loader(folder), 6)
        by_host = [take(make_loader(folder, host=h, hosts=hosts), 6) for h in range(hosts)]
        joined = [
            {name: np.concatenate([rows[name] for rows in step]) for name in step[0]}
            for step in zip(*by_host)
        ]
        assert_equal(joined, global_batches)

    def test_every_epoch_is_another_permutation(self, folder):
        index = np.concatenate([batch["index"] for batch in take(make_loader(folder), 10)])
        first, second = index[:20], index[20:]
        assert sorted(first) == sorted(second) == list(range(20))
        assert (first != second).any()

    def test_record_indices_of_a_step(self, folder):
        loader = make_loader(folder)
        for step, batch in enumerate(take(loader, 7)):
            assert loader.record_indices(step) == batch["index"].tolist()

    def test_the_seed_changes_the_order(self, folder):
        one, two = (take(make_loader(folder, seed=seed), 2) for seed in (1, 2))
        assert (one[0]["index"] != two[0]["index"]).any()

    def test_error_names_the_bad_image(self, folder):
        bad = folder / "zebra" / "4.png"
        bad.write_bytes(bad.read_bytes()[:100])
        for workers in (0, 1):
            with pytest.raises(DataError, match=r"zebra/4.png is bad: .*data.on_bad=skip"):
                take(make_loader(folder, workers=workers), 6)

    def test_skipped_image_is_replaced_and_logged_once(self, folder, caplog):
        good = take(make_loader(folder), 5)
        bad = folder / "ant" / "9.png"
        index = FolderSource(str(folder), "train").files.index("ant/9.png")
        bad.write_bytes(b"")
        batches = take(make_loader(folder, skip=True), 10)
        for before, after in zip(good, batches):  # all other rows are unchanged
            np.testing.assert_array_equal(before["index"], after["index"])
            others = before["index"] != index
            np.testing.assert_array_equal(before["image"][others], after["image"][others])
        warnings = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
        assert warnings == [f"skipped a bad image (1 so far): {bad}: it is empty"]

    def test_too_many_bad_images(self, folder):
        for i in (0, 3, 6):
            (folder / "ant" / f"{i}.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"data.max_bad=2 does not suffice: 3 images .*ant/"):
            take(make_loader(folder, skip=True, max_bad=2), 5)

    def test_too_many_consecutive_bad_images(self, folder):
        for i in range(10):
            (folder / "ant" / f"{i}.png").write_bytes(b"")
        with pytest.raises(
            DataError, match="data.max_bad=5 does not suffice: 6 consecutive images"
        ):
            take(make_loader(folder, skip=True, max_bad=5), 5)

    def test_batch_larger_than_the_dataset(self, folder):
        with pytest.raises(DataError, match="batch_size=32 is larger than the dataset of 20"):
            make_loader(folder, batch_size=32)


class TestEvalBatches:
    def test_every_record_once_in_order(self, folder):
        source = FolderSource(str(folder), "train")
        batches = list(eval_batches(source, EvalTransform((8, 8), 3), 8))
        assert [batch["valid"].sum() for batch in batches] == [8, 8, 4]
        index = np.concatenate([batch["index"][batch["valid"]] for batch in batches])
        np.testing.assert_array_equal(index, np.arange(20))

    def test_images_of_different_dtypes_are_an_error(self, tmp_path):
        for number, dtype in enumerate([np.uint8, np.uint8, np.uint16, np.uint8]):
            np.save(tmp_path / f"{number}.npy", np.zeros((9, 9, 2), dtype))
        source = FolderSource(str(tmp_path), "train")
        for batch_size in (4, 2):  # within a batch, and in another batch
            with pytest.raises(DataError, match=r"2.npy has dtype uint16 and shape \[8, 8, 2\]"):
                list(eval_batches(source, EvalTransform((8, 8), 2), batch_size))

    def test_labels_out_of_range_are_an_error(self, folder):
        source = FolderSource(str(folder), "train")
        transform = EvalTransform((8, 8), 3)
        message = "zebra/.* has label 1, which is not within 0 to 0"
        with pytest.raises(DataError, match=message):
            list(eval_batches(source, transform, 4, num_classes=1))
        with pytest.raises(DataError, match=message):
            take(make_loader(folder, num_classes=1), 20)
        assert len(list(eval_batches(source, transform, 4, num_classes=2))) == 5


class TestDeviceResize:
    """Batches of crops that the device resizes."""

    def loader(self, folder, side, **kwargs):
        transform = DeviceResizeTransform(TrainTransform((8, 8), 3, (0.2, 1.0)), side)
        source = FolderSource(str(folder), "train")
        defaults = dict(seed=3, batch_size=4, shapes=transform.shapes)
        return Loader(source=source, transform=transform, **(defaults | kwargs))

    @pytest.mark.parametrize("side", [24, 12])
    def test_crops_equal_those_of_the_host(self, folder, side):
        """Crops resized by Pillow equal the host's; larger crops were resized before."""
        resized = 0
        for one, other in zip(take(make_loader(folder), 8), take(self.loader(folder, side), 8)):
            assert other["crop"].shape == (4, side, side, 3)
            for image, buffer, (height, width), flip in zip(
                one["image"], other["crop"], other["crop_size"], other["flip"]
            ):
                crop = resize(buffer[:height, :width], (8, 8))
                np.testing.assert_array_equal(image, crop[:, :: -1 if flip else 1])
                resized += (height, width) == (8, 8)
        assert (resized > 0) == (side == 12)

    def test_threads_do_not_change_crops(self, folder):
        expected = [self.zero_padding(batch) for batch in take(self.loader(folder, 12), 6)]
        batches = take(self.loader(folder, 12, threads=5), 4, 2)
        assert_equal([self.zero_padding(batch) for batch in batches], expected[2:])

    def zero_padding(self, batch):
        """Return the batch with zeros outside its crops, where values are undefined."""
        crops = np.zeros_like(batch["crop"])
        for row, (height, width) in enumerate(batch["crop_size"]):
            crops[row, :height, :width] = batch["crop"][row, :height, :width]
        return batch | {"crop": crops}


def test_buffers_are_reused_only_when_nothing_refers_to_them():
    pool = BufferPool()
    first = pool.empty((2, 3), np.dtype(np.uint8))
    first[:] = 1
    row = first[1]
    address = first.ctypes.data
    del first
    second = pool.empty((2, 3), np.dtype(np.uint8))
    assert second.ctypes.data != address, "a view of it exists"
    assert row.tolist() == [1, 1, 1]
    del row
    assert pool.empty((6,), np.dtype(np.uint8)).ctypes.data == address


def test_array_loader_has_the_order_of_records(folder):
    arrays = {"number": np.arange(20), "label": np.arange(20) % 3}
    loader = ArrayLoader(arrays=arrays, seed=3, batch_size=4)
    for start in (0, 7):
        for record, row in zip(take(make_loader(folder), 6, start), take(loader, 6, start)):
            np.testing.assert_array_equal(row["number"], record["index"])
            np.testing.assert_array_equal(row["label"], record["index"] % 3)
    assert loader.record_indices(7) == make_loader(folder).record_indices(7)


class TestWorkerProcesses:
    @pytest.fixture(autouse=True)
    def collect_semaphores(self):
        """Free those of closed loaders before new ones are made (CPython gh-109629)."""
        gc.collect()

    def test_killed_worker_is_an_error_and_stops_the_others(self, folder):
        batches = make_loader(folder, workers=2).batches(0)
        next(batches)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match=r"was killed \(exit code -9\): if memory ran out"):
            list(batches)  # endless
        for worker in workers:
            worker.join(HANG_S)
            assert not worker.is_alive(), "hangs"

    def test_worker_with_full_buffers_exits_when_the_loader_is_closed(self, tmp_path, monkeypatch):
        """Grain kills workers that do not exit, for example because a pipe is full."""
        module = "grain._src.python.dataset.transformations.process_prefetch"
        monkeypatch.setattr(f"{module}._PROCESS_KILL_TIMEOUT_S", HANG_S, raising=False)
        for number in range(8):
            noise_image(number, (300, 300)).save(tmp_path / f"{number}.jpg")
        transform = CountCalls(TrainTransform((224, 224), 3, (0.2, 1.0)), tmp_path / "calls")
        source = FolderSource(str(tmp_path), "train")
        loader = Loader(source=source, transform=transform, seed=0, batch_size=8, workers=1)
        batches = loader.batches(0)
        next(batches)
        (worker,) = multiprocessing.active_children()
        # The batch, the buffer of the process, and those of its two threads.
        deadline = time.monotonic() + HANG_S
        while transform.calls() < 8 + PREFETCH + 2 * PREFETCH:
            worker.join(0.02)
            assert time.monotonic() < deadline, "hangs"
        batches.close()
        assert worker.exitcode == 0

    def test_workers_exit_with_a_killed_parent(self, folder):
        code = (
            "import multiprocessing, sys; from test_loader import make_loader\n"
            "batches = make_loader(sys.argv[1], workers=1).batches(0); next(batches)\n"
            "print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)\n"
            "sys.stdin.read()"
        )
        here = Path(__file__).parent
        environment = os.environ | {"PYTHONPATH": f"{here}:{here.parent}"}
        command = [sys.executable, "-c", code, str(folder)]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with subprocess.Popen(command, env=environment, **pipes) as parent:
            worker = os.pidfd_open(int(parent.stdout.readline()))
            parent.kill()
        exited, _, _ = select.select([worker], [], [], HANG_S)
        os.close(worker)
        assert exited, "hangs"


@dataclass(frozen=True)
class CountCalls:
    """A transform that counts its calls, in any process, as the bytes of a file."""

    transform: TrainTransform
    path: Path

    def __call__(self, encoded, rng):
        with self.path.open("ab") as file:
            file.write(b".")
        return self.transform(encoded, rng)

    def calls(self):
        return self.path.stat().st_size
