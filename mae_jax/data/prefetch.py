"""Prefetch batches to the devices while the previous step runs."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
BUFFER_SIZE = 2  # prefetched batches, besides the one in use
CLOSE_TIMEOUT_S = 10.0  # that `close` waits for a batch that is being read


class DevicePrefetcher(Generic[T]):
    """Iterator over `put(batch)` of all batches, computed ahead of time by a thread.

    Args:
      batches: generator, closed when it is exhausted or by `close`; `next` raises its errors.
      put: transfers a batch to the devices.
      on_ready: called with the number of prefetched batches whenever one is requested.
    """

    def __init__(
        self,
        batches: Generator[Any, None, None],
        put: Callable[[Any], T],
        on_ready: Callable[[int], None] = lambda _: None,
    ):
        self._batches, self._put, self._on_ready = batches, put, on_ready
        self._ready: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._free_slots = threading.Semaphore(BUFFER_SIZE)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for batch in self._batches:
                self._free_slots.acquire()
                if self._closing.is_set():
                    break
                self._ready.put(self._put(batch))
            self._ready.put(StopIteration())
        except BaseException as error:  # raised again by __next__
            self._ready.put(error)
        finally:
            self._batches.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self._on_ready(self._ready.qsize())
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)  # every later call raises it as well
            raise item
        self._free_slots.release()
        return item

    def close(self) -> None:
        """Stop the thread and close `batches`."""
        self._closing.set()
        self._free_slots.release()
        self._thread.join(CLOSE_TIMEOUT_S)
