"""Batches prefetched by a thread."""

import threading

import pytest

from mae_jax.data.prefetch import BUFFER_SIZE, DevicePrefetcher

HANG_S = 600  # deadline that only a hang exceeds


def count_to(stop=None, closed=None, error=None):
    """Yield 0, 1, ... stop - 1, then raise an error, if any; set `closed` at the end."""
    number = 0
    try:
        while number != stop:
            yield number
            number += 1
        if error:
            raise error
    finally:
        if closed is not None:
            closed.set()


def test_all_batches_in_order():
    prefetcher = DevicePrefetcher(count_to(5), lambda n: n * 10)
    assert list(prefetcher) == [0, 10, 20, 30, 40]
    assert list(prefetcher) == [], "it stays exhausted"


def test_prefetches_as_many_batches_as_its_buffer_holds():
    requested = threading.Semaphore(0)

    def batches():
        for number in count_to():
            requested.release()  # it blocks after the one that finds no free slot
            yield number

    put, ready = [], []
    prefetcher = DevicePrefetcher(batches(), lambda n: put.append(n) or n, ready.append)
    for _ in range(BUFFER_SIZE + 1):
        assert requested.acquire(timeout=HANG_S)
    assert put == list(range(BUFFER_SIZE))
    assert next(prefetcher) == 0
    assert requested.acquire(timeout=HANG_S)
    assert put == list(range(BUFFER_SIZE + 1))
    assert not requested.acquire(blocking=False)
    assert ready == [BUFFER_SIZE]
    prefetcher.close()


def test_errors_are_raised_after_the_batches_before_them():
    prefetcher = DevicePrefetcher(count_to(2, error=OSError("disk")), lambda n: n)
    assert [next(prefetcher), next(prefetcher)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            next(prefetcher)


def test_closing_ends_the_thread_and_closes_the_batches():
    closed, before = threading.Event(), set(threading.enumerate())
    prefetcher = DevicePrefetcher(count_to(closed=closed), lambda n: n)
    assert next(prefetcher) == 0
    (thread,) = set(threading.enumerate()) - before
    prefetcher.close()
    assert closed.wait(HANG_S)
    thread.join(HANG_S)
    assert not thread.is_alive()
