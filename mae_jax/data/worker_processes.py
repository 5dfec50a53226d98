"""Worker processes that decode images, and their errors."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grain
import numpy as np
from absl import flags

PREFETCH = 16  # records that each thread or process prefetches


class WorkerError(Exception):
    """A worker process was killed; the message gives the likely cause."""


def read_options(threads: int) -> grain.ReadOptions:
    """Return options for a number of prefetching threads; 0 reads in the calling thread."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=PREFETCH * max(threads, 1))


def to_worker_processes(rows: grain.MapDataset, workers: int, threads: int) -> grain.IterDataset:
    """Return a dataset whose rows are computed by processes with `threads` threads each.

    Images are passed in shared memory, which requires contiguous arrays. Everything else that a
    worker prefetches must fit into a pipe (64 KiB): otherwise the worker blocks on writing, and
    closing the iterator waits until grain kills it.
    """
    if not flags.FLAGS.is_parsed():  # grain reads absl flags before it starts processes
        flags.FLAGS.mark_as_parsed()
    contiguous = rows.map(lambda row: {k: np.asarray(v, order="C") for k, v in row.items()})
    dataset = grain.experimental.WithOptionsIterDataset(
        contiguous.to_iter_dataset(read_options(threads)),
        grain.experimental.DatasetOptions(min_shm_size=1024),
    )
    processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=PREFETCH)
    return dataset.mp_prefetch(processes, worker_init_fn=_init_worker)


def _init_worker(index: int, count: int) -> None:
    """Ignore signals, which the parent handles, and exit with the parent."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Exit this process as soon as its parent has exited, even if it was killed."""
    # PR_SET_PDEATHSIG would be sent when the thread ends that started this process.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Convert grain's error about a terminated worker to WorkerError with a likely cause."""
    try:
        yield
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).split("exit code ")[-1].split(".")[0]
        hint = "if memory ran out, lower data.workers or data.threads"
        if code == str(-signal.SIGBUS):
            hint = (
                "shared memory is full: enlarge /dev/shm (docker run --shm-size), or set "
                "data.workers=0"
            )
        raise WorkerError(
            f"a data worker process was killed (exit code {code}): {hint}. The same command "
            "resumes from the last checkpoint"
        ) from error
