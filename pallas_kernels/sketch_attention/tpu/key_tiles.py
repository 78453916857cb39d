"""Which bits of which heads one matrix product reads.

Eight rows of words fill the sublanes of a vector register. Masking one bit of every byte and
reinterpreting the bytes as int8 gives 32 rows that are zero or a power of two; eight such planes,
stacked, are one operand of 256 rows. Its other operand holds the coefficients of several heads,
divided by these powers, each zero where a row belongs to another head.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int8, Int32

_ROWS = 8
_PLANES = 8
_BYTES = 4
_LOWEST_BITS = 0x01010101
_HIGHEST_BITS = -0x7F7F7F80
_SIGN_UNITS = 0x40404040

SIGN_UNIT = -64
"""What a set bit is unpacked to where signs are wanted; a clear bit is its opposite."""


@dataclass(frozen=True)
class KeyTile:
    """Up to eight rows of words that are multiplied at once.

    Attributes:
        first_row: of the words of a grid step.
        first_head: of the grid step.
        heads: how many heads it multiplies.
        words: of a sketch.
    """

    first_row: int
    first_head: int
    heads: int
    words: int

    @property
    def read_rows(self) -> int:
        """Rows that hold bits of these heads."""
        return self.heads * self.words

    @property
    def folds(self) -> int:
        """How many planes share a register where few rows leave room."""
        return _ROWS // self.read_rows if self.read_rows in (1, 2, 4) else 1

    @property
    def steps(self) -> int:
        """Planes that are taken one after the other."""
        return _PLANES // self.folds

    @property
    def contraction(self) -> int:
        """Rows of one operand."""
        return _ROWS * _BYTES * self.steps

    def powers(self, unshifted: int) -> np.ndarray:
        """What a set bit is unpacked to in each row.

        Args:
            unshifted: how many planes are read between two shifts.
        """
        planes = np.arange(self.steps) * self.folds
        return np.repeat(2.0 ** (planes % unshifted), _ROWS * _BYTES)

    def placement(self, head: int) -> np.ndarray:
        """Which row each bit of one head is in: `[bits, contraction]` of zeros and ones.

        Args:
            head: of the tile.
        """
        own = _BYTES * self.words
        bits = np.eye(_PLANES * own, dtype=np.float32)
        planes = bits.reshape(len(bits), self.steps, self.folds, own)
        room = _ROWS // self.folds * _BYTES
        before = head * own
        padded = np.pad(planes, [(0, 0)] * 3 + [(before, room - own - before)])
        return padded.reshape(len(bits), self.contraction)

    def unpack(
        self, words: Int32[Array, "rows tokens"], unshifted: int
    ) -> Int8[Array, "contraction tokens"]:
        """The operand of zeros and `powers`.

        Args:
            words: all rows of the grid step.
            unshifted: as `powers` takes it; 4 spares most shifts, 1 gives ones.
        """
        own = self._own(words)
        planes = []
        for plane in range(0, _PLANES, self.folds):
            low = plane % unshifted
            if low == 0:
                shifted = logical_right(own, plane)
            planes.append(pltpu.bitcast(shifted & (_LOWEST_BITS << low), jnp.int8))
        return jnp.concatenate(planes)

    def unpack_signs(self, words: Int32[Array, "rows tokens"]) -> Int8[Array, "contraction tokens"]:
        """The operand of `SIGN_UNIT` for a set bit and its opposite for a clear one.

        Args:
            words: all rows of the grid step.
        """
        own = self._own(words)
        planes = [
            pltpu.bitcast((own << (7 - plane)) & _HIGHEST_BITS | _SIGN_UNITS, jnp.int8)
            for plane in range(0, _PLANES, self.folds)
        ]
        return jnp.concatenate(planes)

    def _own(self, words: Int32[Array, "rows tokens"]) -> Int32[Array, "8 tokens"]:
        own = words[self.first_row : self.first_row + self.read_rows]
        if self.folds > 1:
            return jnp.concatenate([logical_right(own, fold) for fold in range(self.folds)])
        padding = _ROWS - self.read_rows
        if padding == 0:
            return own
        return jnp.concatenate([own, jnp.zeros((padding, own.shape[1]), jnp.int32)])


def divide_rows(heads: int, words: int, *, apart: bool) -> tuple[KeyTile, ...]:
    """Tiles of as many whole heads as fit into eight rows, or of one head each."""
    together = 1 if apart else _ROWS // words
    return tuple(
        KeyTile(head * words, head, min(together, heads - head), words)
        for head in range(0, heads, together)
    )


def logical_right(words: Int32[Array, "rows tokens"], amount: int) -> Int32[Array, "rows tokens"]:
    """Bits moved down by a constant, zeros from above."""
    if amount == 0:
        return words
    return lax.shift_right_logical(words, jax.lax.full_like(words, amount))
