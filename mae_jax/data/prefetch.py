"""Batches on their way to the devices, made ready while the step before them runs."""

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
BUFFER_SIZE = 2  # batches that may lie ready beside the one in use
CLOSE_TIMEOUT_S = 10.0  # seconds that closing waits for a batch that is being read


class DevicePrefetcher(Generic[T]):
    """Iterates over `put` of all batches, which a thread works ahead of the loop.

    Args:
      batches: is closed when the feed is, or at its end. What it raises is raised by the feed.
      put: brings a batch to the devices.
      note_ready: is told, whenever a batch is asked for, how many lay ready.
    """

    def __init__(
        self,
        batches: Generator[Any, None, None],
        put: Callable[[Any], T],
        note_ready: Callable[[int], None] = lambda _: None,
    ):
        self._batches, self._put, self._note_ready = batches, put, note_ready
        self._ready: queue.SimpleQueue[T | BaseException] = queue.SimpleQueue()
        self._places = threading.Semaphore(BUFFER_SIZE)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="feed", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            for batch in self._batches:
                self._places.acquire()
                if self._closing.is_set():
                    break
                self._ready.put(self._put(batch))
            self._ready.put(StopIteration())
        except BaseException as error:  # the loop is to hear of it
            self._ready.put(error)
        finally:
            self._batches.close()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        self._note_ready(self._ready.qsize())
        found = self._ready.get()
        if isinstance(found, BaseException):
            self._ready.put(found)  # for whoever asks again
            raise found
        self._places.release()
        return found

    def close(self) -> None:
        """Ends the thread, and what it reads from."""
        self._closing.set()
        self._places.release()
        self._thread.join(CLOSE_TIMEOUT_S)
