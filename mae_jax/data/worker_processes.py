"""Processes that read images, and what becomes of them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grain
import numpy as np
from absl import flags

PREFETCH = 16  # records that a thread, or a process, may be ahead


class WorkerError(Exception):
    """A process that reads images is gone; the message says why that may be."""


def read_options(threads: int) -> grain.ReadOptions:
    """Of so many threads; 0 reads where it is asked."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH * max(threads, 1))


def to_worker_processes(rows: grain.MapDataset, workers: int, threads: int) -> grain.IterDataset:
    """The rows, made by processes of so many threads each.

    Images go through shared memory, which takes only contiguous arrays. What else there is of the
    rows of a worker has to fit into a pipe (64 KiB): otherwise a worker cannot end before somebody
    reads it, and whoever closes the iterator waits for the worker.
    """
    if not flags.FLAGS.is_parsed():  # grain reads them before it starts processes
        flags.FLAGS.mark_as_parsed()
    contiguous = rows.map(lambda row: {k: np.asarray(v, order="C") for k, v in row.items()})
    records = grain.experimental.WithOptionsIterDataset(
        contiguous.to_iter_dataset(read_options(threads)),
        grain.experimental.DatasetOptions(min_shm_size=1024),
    )
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCH)
    return records.mp_prefetch(processes, worker_init_fn=_init_worker)


def _init_worker(index: int, count: int) -> None:
    """A worker leaves stopping to its parent, and does not outlive it."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Ends this process when its parent ends, however that is."""
    # Not by PR_SET_PDEATHSIG: that is sent when the thread ends that started the process.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Says of a worker that was killed what that means."""
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).split("exit code ")[-1].split(".")[0]
        why = "if memory ran out, lower data.workers or data.threads"
        if code == str(-signal.SIGBUS):
            why = "shared memory is full: make /dev/shm larger (docker run --shm-size), or set "
            why += "data.workers=0"
        raise WorkerError(
            f"a process that reads images was killed (exit code {code}): {why}. The same command "
            "continues from the last checkpoint"
        ) from error
