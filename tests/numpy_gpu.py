"""The vocabulary of `pallas_kernels.mosaic_gpu` on NumPy arrays with one element per thread."""

import ml_dtypes
import numpy as np


class Number:
    """What every thread has one of; constants are scalars."""

    dtype: type

    def __init__(self, value):
        self.value: np.ndarray = np.asarray(value).astype(self.dtype)

    @classmethod
    def constant(cls, number):
        return cls(number)

    def __add__(self, other):
        return type(self)(self.value + raw(other))

    def __sub__(self, other):
        return type(self)(self.value - raw(other).astype(self.dtype))

    def __mul__(self, other):
        return type(self)(self.value * raw(other).astype(self.dtype))

    def equals(self, other):
        return Truth(self.value == raw(other))


class Truth(Number):
    dtype = np.bool_

    def __and__(self, other):
        return Truth(self.value & other.value)


class I32(Number):
    dtype = np.int32

    def __and__(self, other):
        return I32(self.value & raw(other))

    def __or__(self, other):
        return I32(self.value | raw(other))

    def __lshift__(self, other):
        return I32(self.value << raw(other))

    def __rshift__(self, other):
        return I32(self._unsigned >> raw(other).astype(np.uint32))

    def __floordiv__(self, other):
        return I32(self._unsigned // raw(other).astype(np.uint32))

    def __mod__(self, other):
        return I32(self._unsigned % raw(other).astype(np.uint32))

    def less(self, other):
        return Truth(self.value < raw(other))

    def minimum(self, other):
        return I32(np.minimum(self.value, raw(other)))

    def maximum(self, other):
        return I32(np.maximum(self.value, raw(other)))

    def as_float(self):
        return F32(self.value.view(np.float32))

    def wide(self):
        return I64(self._unsigned)

    @property
    def _unsigned(self):
        return self.value.view(np.uint32)


class I64(Number):
    dtype = np.int64


class F32(Number):
    dtype = np.float32

    def __neg__(self):
        return F32(-self.value)

    def greater(self, other):
        return Truth(self.value > raw(other))

    def at_least(self, other):
        return Truth(self.value >= raw(other))

    def to_integer(self):
        return I32(self.value)

    def as_bits(self):
        return I32(self.value.view(np.int32))


def raw(number):
    return number.value if isinstance(number, Number) else np.asarray(number)


class Block:
    """A block of threads that run in step, which is one of the orders that a GPU may take.

    It stands for the modules `ptx` and `registers`.
    """

    I32, F32 = I32, F32

    def __init__(self, threads, shared_bytes):
        self.thread = I32(np.arange(threads))
        self._shared = np.full(shared_bytes, 0xFF, np.uint8)
        self._arrays = np.zeros(0, np.uint8)
        self._active = np.ones(threads, bool)

    def place(self, array):
        """Adds an array to global memory; returns its address."""
        start = self._arrays.size
        padding = np.zeros(-array.nbytes % 16, np.uint8)
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._arrays = np.concatenate([self._arrays, content, padding])
        return I64(start)

    def read_back(self, address, like):
        """The array at an address."""
        start = int(address.value)
        content = self._arrays[start : start + like.nbytes]
        return content.view(like.dtype).reshape(like.shape).copy()

    def select(self, condition, yes, no):
        return type(yes)(np.where(condition.value, yes.value, no.value))

    def when(self, condition, then):
        before, self._active = self._active, self._active & condition.value
        then()
        self._active = before

    def load(self, address, offset=0, *, count=1):
        words, index = self._find(address, offset, 4 * count, np.int32)
        return [I32(words[index + i]) for i in range(count)]

    def load_half(self, address, offset=0):
        halves, index = self._find(address, offset, 2, np.uint16)
        return I32(halves[index])

    def store(self, address, value, *, offset=0, only=None):
        if only is not None:
            self.when(only, lambda: self.store(address, value, offset=offset))
            return
        words, index = self._find(address, offset, 4, np.int32)
        bits = np.broadcast_to(value.value.view(np.int32), self._active.shape)
        words[index[self._active]] = bits[self._active]

    def store_half(self, address, value, *, offset=0):
        halves, index = self._find(address, offset, 2, np.uint16)
        bits = np.broadcast_to(value.value, self._active.shape).astype(np.uint16)
        halves[index[self._active]] = bits[self._active]

    def prefetch(self, address, offset=0):
        self._find(address, offset, 1, np.uint8)

    def barrier(self):
        assert self._active.all()

    def warp_barrier(self):
        self._whole_warps()

    def shuffle_xor(self, x, mask):
        self._whole_warps()
        return type(x)(x.value[self.thread.value ^ mask])

    def ballot(self, bit):
        self._whole_warps()
        bits = (bit.value != 0).reshape(-1, 32).astype(np.uint64)
        words = (bits << np.arange(32, dtype=np.uint64)).sum(1)
        return I32(np.repeat(words.astype(np.uint32).view(np.int32), 32))

    def multiply_singles(self, a, b, c):
        self._whole_warps()
        warps = self._active.size // 32
        row, column = np.divmod(np.arange(32), 4)

        def matrix(shape, parts, places):
            whole = np.zeros((warps, *shape), np.float32)
            for part, (i, j) in zip(parts, places, strict=True):
                whole[:, i, j] = np.broadcast_to(part.value, self._active.shape).reshape(warps, 32)
            return whole

        def single(x):
            return (x.view(np.int32) & -(1 << 13)).view(np.float32)

        in_a = [(row, column), (row + 8, column), (row, column + 4), (row + 8, column + 4)]
        in_b = [(column, row), (column + 4, row)]
        in_c = [(row + i, 2 * column + j) for i in (0, 8) for j in (0, 1)]
        product = single(matrix((16, 8), a, in_a)) @ single(matrix((8, 8), b, in_b))
        product = product + matrix((16, 8), c, in_c)
        return [F32(product[:, i, j].reshape(-1)) for i, j in in_c]

    def minimum(self, a, b):
        return F32(np.minimum(a.value, b.value))

    def maximum(self, a, b):
        return F32(np.maximum(a.value, b.value))

    def reciprocal(self, x):
        return F32(1 / x.value)

    def divide(self, a, b):
        return F32(a.value / b.value)

    def square_root(self, x):
        return F32(np.sqrt(x.value))

    def absolute(self, x):
        return F32(np.abs(x.value))

    def floor(self, x):
        return F32(np.floor(x.value))

    def nearest(self, x):
        return F32(np.round(x.value))

    def to_bfloat16(self, x):
        return I32(x.value.astype(ml_dtypes.bfloat16).view(np.uint16))

    def from_float16(self, bits):
        return F32(bits.value.astype(np.uint16).view(np.float16))

    def _whole_warps(self):
        warps = self._active.reshape(-1, 32)
        assert (warps.all(1) | ~warps.any(1)).all()

    def _find(self, address, offset, alignment, dtype):
        """Memory in a dtype, and where in it each thread's address is; 0 if it is switched off."""
        memory = self._arrays if isinstance(address, I64) else self._shared
        start = np.broadcast_to(address.value + offset, self._active.shape)
        start = np.where(self._active, start, 0)
        assert (start >= 0).all()
        assert (start < memory.size).all()
        assert alignment == 1 or not (start % alignment).any()
        itemsize = np.dtype(dtype).itemsize
        return memory[: memory.size // itemsize * itemsize].view(dtype), start // itemsize
