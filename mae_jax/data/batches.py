"""Examples put together as batches, in memory that is used again."""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mae_jax.data.sources import DataError, Source
from mae_jax.data.transforms import Example

Batch = dict[str, np.ndarray]
Shapes = Mapping[str, tuple[int, ...]]


class BufferPool:
    """Gives arrays whose memory is used again when nobody holds them any more.

    That of a batch is large enough for every allocation to ask the system for it, and clearing it
    takes a tenth of the time that decoding takes.
    """

    def __init__(self):
        self._free: dict[int, list[bytearray]] = defaultdict(list)

    def array(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array of any content."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free[size]
        memory = free.pop() if free else bytearray(size)
        # Whatever is made of this array, slices too, holds it, and not the array that is returned.
        owner = np.frombuffer(memory, dtype)
        weakref.finalize(owner, free.append, memory)
        return owner.reshape(shape)


def collate(
    examples: Iterable[Example], size: int, source: Source, shapes: Shapes
) -> Iterator[Batch]:
    """Batches of `size` examples, each copied to its row as soon as it comes.

    Args:
      shapes: of arrays that differ in size; each lies in the corner of its place.

    Raises:
      DataError: images are not all of one type, or else not of one shape.
    """
    memory, batch = BufferPool(), Batch()
    places: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for number, example in enumerate(examples):
        if not places:
            places = {k: (shapes.get(k, v.shape), v.dtype) for k, v in example.items()}
        row = number % size
        if row == 0:
            batch = {k: memory.array((size, *shape), kind) for k, (shape, kind) in places.items()}
        for name, value in example.items():
            shape, kind = places[name]
            if value.dtype != kind or (name not in shapes and value.shape != shape):
                raise DataError(
                    f"{source.describe(int(example['index']))} has values of {value.dtype} "
                    f"{list(value.shape)}, and images before it of {kind} {list(shape)}: all have "
                    "to be of one type"
                )
            batch[name][(row, *map(slice, value.shape))] = value
        if row == size - 1:
            yield batch
