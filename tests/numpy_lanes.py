"""The vocabulary of `pallas_kernels.append.lanes` on NumPy arrays, one element per thread."""

from contextlib import contextmanager

import ml_dtypes
import numpy as np


class NumpyLanes:
    """Runs all threads of a block in step, which is one of the orders that a GPU may take."""

    def __init__(self, threads):
        self.thread = np.arange(threads, dtype=np.int32)
        self.lane, self.warp = self.thread % 32, self.thread // 32
        self._active = np.ones(threads, bool)

    def shape(self, ref):
        return ref.shape

    def load(self, ref, *indices):
        # Threads that are switched off may have any index.
        found = ref[tuple(np.where(self._active, i, 0) for i in indices)]
        return found if found.dtype == np.int32 else found.astype(np.float32)

    def store(self, ref, value, *indices):
        kept = [np.broadcast_to(i, self.thread.shape)[self._active] for i in indices]
        assert all((i >= 0).all() for i in kept)
        value = np.broadcast_to(value, self.thread.shape)
        ref[tuple(kept)] = value[self._active].astype(ref.dtype)

    def address(self, ref, *indices):
        spread = tuple(np.broadcast_to(i, self.thread.shape) for i in indices)
        return ref.reshape(-1), np.ravel_multi_index(spread, ref.shape)

    def fetch(self, address, offset):
        array, index = address
        return array[index + offset]

    def prefetch(self, address, offset):
        self.fetch(address, offset)

    def barrier(self):
        assert self._active.all()

    def shuffle(self, x, distance):
        warps = self._active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all()
        return x[self.thread ^ distance]

    @contextmanager
    def when(self, condition):
        before, self._active = self._active, self._active & condition
        yield
        self._active = before

    def select(self, condition, yes, no):
        real = any(np.asarray(x).dtype.kind == "f" for x in (yes, no))
        return np.where(condition, yes, no).astype(np.float32 if real else np.int32)

    def equal(self, a, b):
        return a == b

    def integer(self, number):
        return np.full(self.thread.shape, number, np.int32)

    def real(self, number):
        return np.full(self.thread.shape, number, np.float32)

    def fma(self, a, b, c):
        return (a.astype(np.float64) * b + c).astype(np.float32)

    minimum = staticmethod(np.minimum)
    maximum = staticmethod(np.maximum)
    absolute = staticmethod(np.abs)
    root = staticmethod(np.sqrt)
    floor = staticmethod(np.floor)
    round = staticmethod(np.round)

    def to_integer(self, x):
        return x.astype(np.int32)

    def to_real(self, x):
        return x.astype(np.float32)

    def to_bf16(self, x):
        return x.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.int32)

    def from_bf16(self, bits):
        return (bits << 16).view(np.float32)
