"""Copy examples into batches, in memory that is reused."""

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
    """Allocates arrays from memory that is reused once no array refers to it.

    Batches are so large that every allocation would be a system call, and zeroing the memory takes
    a tenth of the time of decoding.
    """

    def __init__(self):
        self._free: dict[int, list[bytearray]] = defaultdict(list)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an uninitialized array."""
        size = math.prod(shape) * dtype.itemsize
        free = self._free[size]
        memory = free.pop() if free else bytearray(size)
        # Views of the returned array refer to this base array, not to the returned one.
        base = np.frombuffer(memory, dtype)
        weakref.finalize(base, free.append, memory)
        return base.reshape(shape)


def collate(
    examples: Iterable[Example], size: int, source: Source, shapes: Shapes
) -> Iterator[Batch]:
    """Yield batches of `size` examples, copying each example as it arrives.

    Args:
      source: source of the examples; names an example in errors by its "index".
      shapes: row shape of arrays that differ in size, by name; each is written to the corner of
        its row, the rest of which is undefined.

    Raises:
      DataError: images differ in dtype, or in shape without an entry in `shapes`.
    """
    pool, batch = BufferPool(), Batch()
    rows: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for number, example in enumerate(examples):
        if not rows:
            rows = {k: (shapes.get(k, v.shape), v.dtype) for k, v in example.items()}
        row = number % size
        if row == 0:
            batch = {k: pool.empty((size, *shape), dtype) for k, (shape, dtype) in rows.items()}
        for name, value in example.items():
            shape, dtype = rows[name]
            if value.dtype != dtype or (name not in shapes and value.shape != shape):
                raise DataError(
                    f"{source.describe(int(example['index']))} has dtype {value.dtype} and shape "
                    f"{list(value.shape)}, but images before it {dtype} and {list(shape)}: all "
                    "images must have the same dtype and number of channels"
                )
            batch[name][(row, *map(slice, value.shape))] = value
        if row == size - 1:
            yield batch
