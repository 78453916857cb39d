"""Tiles on their way from global memory through shared memory into registers."""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.registers import I32, I64, select
from pallas_kernels.mosaic_gpu.sequence import Sequence
from pallas_kernels.sketch_attention.gpu_mosaic.lane import Lane
from pallas_kernels.sketch_attention.gpu_mosaic.plan import TILE, Plan
from pallas_kernels.sketch_attention.gpu_mosaic.values import value_offset

_ROW = 4 * TILE
_PARTS = 8
"""Pieces of 16 bytes in a row of a tile; a warp copies four rows at once."""


@dataclass(frozen=True)
class TileCopier:
    """Copies the tiles of a warp into shared memory.

    Each lane copies 16 bytes of every fourth row. Within a row the pieces are stored in another
    order, so that lanes which read different rows at once do so from different banks.

    Attributes:
        plan: of the call.
        sequence: of the warp's tiles.
        lane: number of the lane.
        keys: what the lane copies first of the first tile.
        values: likewise of its values.
        shared: likewise of scales and zeros, or of scalars.
    """

    plan: Plan
    sequence: Sequence
    lane: I32
    keys: I64
    values: I64
    shared: I64

    @classmethod
    def of(cls, lane: Lane, sequence: Sequence) -> "TileCopier":
        """The copier of a lane."""
        plan, operands, block = lane.plan, lane.operands, lane.block
        number = block.lane
        row_bytes = 4 * plan.tokens
        own = (number // _PARTS).wide() * row_bytes + number % _PARTS * 16
        shared = lane.stacked(operands.value_affine, 1) + number * 16
        if operands.key_scales is not None:
            scalars = lane.stacked(operands.key_scales, 2, plan.tokens // 4)
            shared = select(number.less(_PARTS), shared, scalars + (number - _PARTS) * 16)
        return cls(
            plan,
            sequence,
            number,
            lane.stacked(operands.key_words, plan.key_words) + own,
            lane.stacked(operands.value_words, plan.value_words) + own,
            shared,
        )

    def copy(self, index: I32, target: I32) -> None:
        """Begins to copy the warp's tile of an index to an address in shared memory."""
        plan = self.plan
        tile = self.sequence.at(index)
        offset = tile.wide() * _ROW
        row, part = self.lane // _PARTS, self.lane % _PARTS
        self._copy_rows(self.keys + offset, plan.key_words, target + key_offset(row, part))
        self._copy_rows(
            self.values + offset, plan.value_words, target + value_offset(row, part, plan.key_words)
        )
        place = target + plan.affine_row * _ROW + self.lane * 16
        if not plan.scaled:
            ptx.copy_async(place, self.shared + offset, only=self.lane.less(_PARTS))
            return
        # Tiles 0 and 1 of four lie in the first row of the pair, tiles 2 and 3 in the second.
        column = ((tile >> 2) * 2 + (tile & 1)) * (2 * TILE)
        scalars = ((tile >> 1) & 1) * plan.tokens + column
        own = self.shared + select(self.lane.less(_PARTS), tile * _ROW, scalars).wide()
        ptx.copy_async(place, own, only=self.lane.less(_PARTS + _PARTS // 2))

    def _copy_rows(self, source: I64, rows: int, target: I32) -> None:
        for first in range(0, rows, 4):
            # Of fewer than four rows that are left, the other lanes copy nothing.
            only = None if rows - first >= 4 else (self.lane // _PARTS).less(rows - first)
            offset = first * 4 * self.plan.tokens
            ptx.copy_async(target + first * _ROW, source, offset, only=only)


@dataclass(frozen=True)
class KeyReader:
    """Reads what a lane needs of the keys of a tile in shared memory: of four tokens.

    Attributes:
        plan: of the call.
        words: offsets of the words in a tile.
        token: the first of the four tokens.
    """

    plan: Plan
    words: list[I32]
    token: I32

    @classmethod
    def of(cls, lane: Lane) -> "KeyReader":
        """The reader of a lane."""
        plan = lane.plan
        words = []
        for read in range(plan.key_reads):
            own = lane.column + 4 * read
            own = own & 1 if plan.halved else own.minimum(plan.key_words - 1)
            words.append(key_offset(own, lane.token >> 2))
        return cls(plan, words, lane.token)

    def load(self, tile: I32) -> tuple[list[list[I32]], list[I32], list[I32]]:
        """For each read the words of a sketch; scales and zeros of values; packed scalars."""
        words = [ptx.load(tile + offset, count=4) for offset in self.words]
        row = self.plan.affine_row * _ROW
        affine = ptx.load(tile + self.token * 4, row, count=4)
        scalars = []
        if self.plan.scaled:
            scalars = ptx.load(tile + self.token * 2, row + _ROW, count=2)
        return words, affine, scalars


def key_offset(row: I32, part: I32) -> I32:
    """Byte offset in a tile of 16 bytes of a row of keys."""
    return row * _ROW + (part ^ (row & 3)) * 16
