"""Batches made ready by a thread."""

import threading
import time

import pytest

from mae_jax.data.prefetch import BUFFER_SIZE, DevicePrefetcher


def counted(stop=None, closed=None, error=None):
    number = 0
    try:
        while number != stop:
            yield number
            number += 1
        if error:
            raise error
    finally:
        if closed is not None:
            closed.append(number)


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_all_batches_in_order():
    feed = DevicePrefetcher(counted(5), lambda n: n * 10)
    assert list(feed) == [0, 10, 20, 30, 40]
    assert list(feed) == [], "it stays at its end"


def test_works_ahead_but_not_further():
    put, ready = [], []
    feed = DevicePrefetcher(counted(), lambda n: put.append(n) or n, ready.append)
    until(lambda: len(put) == BUFFER_SIZE)
    assert next(feed) == 0
    until(lambda: len(put) == BUFFER_SIZE + 1)
    time.sleep(0.05)
    assert len(put) == BUFFER_SIZE + 1
    assert ready == [BUFFER_SIZE]
    feed.close()


def test_errors_reach_the_loop_after_the_batches_before_them():
    feed = DevicePrefetcher(counted(2, error=OSError("disk")), lambda n: n)
    assert [next(feed), next(feed)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="disk"):
            next(feed)


def test_closing_ends_the_thread_and_what_it_reads():
    closed = []
    before = threading.active_count()
    feed = DevicePrefetcher(counted(closed=closed), lambda n: n)
    until(lambda: threading.active_count() == before + 1)
    feed.close()
    assert threading.active_count() == before
    assert closed
