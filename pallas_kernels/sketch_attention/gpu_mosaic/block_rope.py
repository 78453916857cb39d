"""Queries turned back by the positions of the RoPE blocks that a warp reads."""

from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.launch import Block
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, Bool, loop, select
from pallas_kernels.mosaic_gpu.softmax import LOG2_E
from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import QueryReader
from pallas_kernels.sketch_attention.gpu_mosaic.plan import COLUMNS

_RADIANS_PER_UNIT = 6.283185307179586 / 2.0**32


@dataclass(frozen=True)
class BlockQueries:
    """Computes the operands of a warp's next RoPE blocks.

    Attributes:
        reader: of the queries.
        mean: address of the KV head's mean key.
        frequencies: address of the RoPE frequencies.
    """

    reader: QueryReader
    mean: I64
    frequencies: I64

    def prepare(self, block: Block) -> list[F32]:
        """Brings everything into shared memory that does not depend on the position.

        Returns:
            For each operand, undoes the normalisation of the query at the lane's row.
        """
        reader, plan = self.reader, self.reader.plan
        threads = 32 * plan.warps
        shared = plan.shared

        def copy(source: I64, target: int, words: int) -> None:
            def step(index: I32, carry: list) -> list:
                values = ptx.load(source + index * 16, count=4)
                ptx.store(block.shared + target + index * 16, *values)
                return carry

            loop(block.thread, I32.constant(words // 4), threads, [], step)

        copy(reader.fragments, shared.transform, plan.transform_bytes // 4)
        copy(self.mean, shared.mean, plan.head_dim)

        def turn(index: I32, carry: list) -> list:
            radians = ptx.load(self.frequencies + index * 4)[0].as_float()
            assert plan.period is not None
            turns = ptx.turns_per_step(radians, plan.period)
            ptx.store(block.shared + shared.turns + index * 4, turns)
            further = _cosine_and_sine(turns * plan.shared_blocks)
            ptx.store(block.shared + shared.further + index * 8, *further)
            return carry

        loop(block.thread, I32.constant(plan.head_dim // 2), threads, [], turn)

        restore = []
        for number in range(plan.operands):
            head = reader.head_of(reader.row) + COLUMNS * number
            channels, own = reader.load_normalised(head, plan.groups)
            restore.append(own)
            place = block.shared + shared.queries + head * plan.query_bytes + reader.column * 8
            _keep(place, channels, only=block.warp.equals(0) & head.less(plan.groups))
        return restore

    def update(self, first_tile: I32, restore: list[F32], factors: list[list[F32]]) -> None:
        """Computes the operands of the blocks that begin at a tile, and their columns.

        Args:
            first_tile: number of the tile.
            restore: for each operand of a tile, what `prepare` gave.
            factors: for each operand of a tile, `Columns.factor`.
        """
        reader, plan = self.reader, self.reader.plan
        assert plan.period is not None
        block = first_tile // plan.tiles_per_block if plan.tiles_per_block > 1 else first_tile
        rows, means = self._rows(block)
        region = reader.region(reader.warp)
        transform = reader.shared + plan.shared.transform
        reader.transform(rows, I32.constant(0), 1, region, transform)
        ptx.warp_barrier()
        places = reader.shared + plan.shared.columns + reader.warp * plan.column_bytes
        for number in range(plan.sets):
            operand = number if plan.operands > 1 else 0
            factor = factors[operand]
            total = reader.sum_all(reader.region(reader.warp, number))
            base = [(x * y) * 0.5 for x, y in zip(total, factor, strict=True)]
            place = places + number * (1 + plan.shared_blocks) * COLUMNS * 4
            ptx.store(place + reader.column * 8, *base, only=reader.row.equals(0))
            bias = means[number] * restore[operand] * (LOG2_E / plan.head_dim**0.5)
            for parity in range(plan.shared_blocks):
                mine = (reader.row // plan.stride).equals(parity)
                value = select(mine, bias, F32.constant(float("-inf")))
                ptx.store(
                    place + reader.row * 4,
                    value,
                    offset=(1 + parity) * COLUMNS * 4,
                    only=reader.column.equals(0),
                )
        ptx.warp_barrier()

    def columns(self, number: I32 | int, parity: I32 | int) -> list[F32]:
        """`Columns.base` and `Columns.bias` of the lane's two columns, in that order."""
        reader, plan = self.reader, self.reader.plan
        place = reader.shared + plan.shared.columns + reader.warp * plan.column_bytes
        place = place + reader.column * 8
        row = COLUMNS * 4
        at = _times(number, (1 + plan.shared_blocks) * row)
        base = ptx.load(place + at, count=2)
        bias = ptx.load(place + at + _times(parity, row), row, count=2)
        return [word.as_float() for word in (*base, *bias)]

    def _rows(self, block: I32) -> tuple[list[list[I32]], list[F32]]:
        """Turned queries as operands, and their product with the mean key.

        The second eight rows of an operand are other heads, or the same ones in later blocks:
        those are turned further, always by the same angles.
        """
        reader, plan = self.reader, self.reader.plan
        shared, half = plan.shared, plan.slices // 2
        head = reader.head_of(reader.row)
        own_block = block + reader.row // plan.stride
        sources = [
            reader.shared
            + shared.queries
            + (head + COLUMNS * number).minimum(plan.groups - 1) * plan.query_bytes
            + reader.column * 8
            for number in range(plan.operands)
        ]
        channels = reader.shared + reader.column * 8
        further = reader.shared + shared.further + reader.column * 16
        means = [F32.constant(0.0), F32.constant(0.0)]
        registers: list[list[I32]] = [[] for _ in range(plan.slices)]
        for part in range(half):
            for offset in (0, 32):
                place = 64 * part + offset
                turns = ptx.load(channels + shared.turns, place, count=2)
                mean = _in_order(self._pairs(channels + shared.mean, place))
                angles = [_cosine_and_sine(turn * own_block) for turn in turns]
                rows = [_turn_back(self._pairs(source, place), angles) for source in sources]
                if plan.operands == 1:
                    words = [word.as_float() for word in ptx.load(further, 2 * place, count=4)]
                    rows.append(_turn_back(rows[0], [(words[0], words[1]), (words[2], words[3])]))
                for number, pairs in enumerate(rows):
                    values = _in_order(pairs)
                    for value, weight in zip(values, mean, strict=True):
                        means[number] = ptx.fma(value, weight, means[number])
                    registers[part].append(ptx.pack_halves(*values[:2]))
                    registers[part + half].append(ptx.pack_halves(*values[2:]))
        totals = []
        for total in means:
            for mask in (1, 2):
                total = total + ptx.shuffle_xor(total, mask)
            totals.append(total)
        return registers, totals

    def _pairs(self, source: I32, place: int) -> list[tuple[F32, F32]]:
        """Two channels of a vector, each with the one that RoPE turns it into."""
        apart = 2 * self.reader.plan.head_dim
        first, second = (
            [word.as_float() for word in ptx.load(source, start, count=2)]
            for start in (place, place + apart)
        )
        return list(zip(first, second, strict=True))


def _in_order(pairs: Sequence[tuple[F32, F32]]) -> list[F32]:
    """The first channels of all pairs, then the second ones."""
    return [x for x, _ in pairs] + [y for _, y in pairs]


def _keep(place: I32, channels: list[F32], *, only: Bool) -> None:
    for pair in range(len(channels) // 2):
        ptx.store(place, *channels[2 * pair : 2 * pair + 2], offset=32 * pair, only=only)


def _cosine_and_sine(phase: I32) -> tuple[F32, F32]:
    """Those of a phase in units of 2⁻³² turns."""
    angle = phase.to_float() * _RADIANS_PER_UNIT
    return ptx.cosine(angle), ptx.sine(angle)


def _turn_back(
    pairs: Sequence[tuple[F32, F32]], angles: Sequence[tuple[F32, F32]]
) -> list[tuple[F32, F32]]:
    """Channel pairs turned by minus an angle each, of which cosine and sine are given."""
    return [
        (ptx.fma(y, sine, x * cosine), ptx.fma(-x, sine, y * cosine))
        for (x, y), (cosine, sine) in zip(pairs, angles, strict=True)
    ]


def _times(number: I32 | int, factor: int) -> I32:
    return I32.constant(number * factor) if isinstance(number, int) else number * factor
