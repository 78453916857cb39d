"""Adding up what the warps of a block of threads found."""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.launch import Block
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, loop, select
from pallas_kernels.mosaic_gpu.softmax import LOG_2


@dataclass(frozen=True)
class Column:
    """What a warp found for one column, the part of a lane.

    Attributes:
        reference: logit with weight 1, in units of log 2.
        total: sum of weights, over all lanes.
        sums: channels, and sums of weights times values there.
    """

    reference: F32
    total: F32
    sums: list[tuple[I32, F32]]


@dataclass(frozen=True)
class Merging:
    """How the columns of all warps make up the attention of query heads.

    Attributes:
        warps: of a block of threads.
        columns: of each, a multiple of 8.
        groups: query heads.
        stride: columns from one copy of a head to the next.
        copies: columns that belong to the same head.
        head_dim: channels.
        splits: of each row; outputs are `[..., heads, splits, head_dim]`.
    """

    warps: int
    columns: int
    groups: int
    stride: int
    copies: int
    head_dim: int
    splits: int

    @property
    def shared_bytes(self) -> int:
        """Shared memory that is needed, from its beginning."""
        return self.warps * self.columns * (8 + 4 * self.head_dim)

    def write(
        self,
        block: Block,
        first_head: I32,
        split: I32,
        found: list[list[Column]],
        output: I64,
        lse: I64,
    ) -> None:
        """Writes the attention of a split; all threads of the block take part.

        Args:
            block: whose shared memory nobody uses any more.
            first_head: index of the first query head among those of all rows of the batch.
            split: index of the split.
            found: for every eight columns, those of the lane.
            output: address of all outputs.
            lse: address of all log-sum-exps.
        """
        ptx.barrier()
        self._keep(block, found)
        ptx.barrier()

        def head_and_channel(index: I32, carry: list) -> list:
            group, channel = index // self.head_dim, index % self.head_dim
            highest, total, value = self._merge(block, group, channel)
            empty = highest.equals(float("-inf"))
            divisor = select(empty, F32.constant(1.0), total)
            part = (first_head + group) * self.splits + split
            place = output + part.wide() * (4 * self.head_dim) + channel * 4
            ptx.store(place, value * ptx.reciprocal(divisor))
            own = (highest + ptx.log2(total)) * LOG_2
            ptx.store(lse + part.wide() * 4, own, only=channel.equals(0))
            return carry

        outputs = I32.constant(self.groups * self.head_dim)
        loop(block.thread, outputs, 32 * self.warps, [], head_and_channel)

    def _sums(self, block: Block) -> I32:
        return block.shared + self.warps * self.columns * 8

    def _keep(self, block: Block, found: list[list[Column]]) -> None:
        row, lane_column = block.lane >> 2, block.lane & 3
        sums = self._sums(block)
        for number, columns in enumerate(found):
            for e, column in enumerate(columns):
                place = block.warp * self.columns + lane_column * 2 + (8 * number + e)
                seen = column.total.greater(0.0)
                reference = select(seen, column.reference, F32.constant(float("-inf")))
                ptx.store(block.shared + place * 8, reference, column.total, only=row.equals(0))
                for channel, value in column.sums:
                    ptx.store(sums + (place * self.head_dim + channel) * 4, value)

    def _merge(self, block: Block, group: I32, channel: I32) -> tuple[F32, F32, F32]:
        """Highest reference, sum of weights, and sum of weights times values at a channel."""
        places = [
            group + (warp * self.columns + copy * self.stride)
            for warp in range(self.warps)
            for copy in range(self.copies)
        ]
        found = [
            [word.as_float() for word in ptx.load(block.shared + place * 8, count=2)]
            for place in places
        ]
        highest = found[0][0]
        for reference, _ in found[1:]:
            highest = ptx.maximum(highest, reference)
        # Without any token all weights are zero, whatever is taken off.
        finite = select(highest.equals(float("-inf")), F32.constant(0.0), highest)
        total = value = F32.constant(0.0)
        for place, (reference, weight) in zip(places, found, strict=True):
            factor = ptx.exp2(reference - finite)
            part = self._sums(block) + (place * self.head_dim + channel) * 4
            total = ptx.fma(weight, factor, total)
            value = ptx.fma(ptx.load(part)[0].as_float(), factor, value)
        return highest, total, value


def over_rows(x: F32) -> F32:
    """The sum over the eight lanes of a column."""
    for mask in (4, 8, 16):
        x = x + ptx.shuffle_xor(x, mask)
    return x
