"""Logits of a tile's tokens, from their sign bits and scalars."""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, select, when
from pallas_kernels.mosaic_gpu.softmax import LOG2_E
from pallas_kernels.sketch_attention.gpu_mosaic.block_rope import BlockQueries
from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import Columns, QueryReader
from pallas_kernels.sketch_attention.gpu_mosaic.lane import Lane
from pallas_kernels.sketch_attention.gpu_mosaic.plan import COLUMNS

# An integer added to these bits is the float of 2²³ plus that integer.
_INTEGER_BITS = 0x4B000000
_INTEGER_FLOAT = 8388608.0


@dataclass(frozen=True)
class Scores:
    """Gives logits.

    Attributes:
        lane: whose.
        reader: of the coefficients; None for signed queries.
        turned: where the RoPE period is finite.
        restore: for each operand, undoes the normalisation of its queries.
        fixed: for each operand, what does not change of its columns.
        signs: for each operand and read, signs of the query of a column, and their complement.
        variance: for each operand, the correction of each column of the lane.
    """

    lane: Lane
    reader: QueryReader | None
    turned: BlockQueries | None
    restore: list[F32]
    fixed: list[Columns]
    signs: list[list[tuple[I32, I32]]]
    variance: list[list[F32]]

    @classmethod
    def prepare(cls, lane: Lane) -> "Scores":
        """Transforms the queries; all threads of the block take part."""
        plan, block, operands = lane.plan, lane.block, lane.operands
        variance = []
        if operands.variance is not None:
            for number in range(plan.operands):
                variance.append(_variance(lane, operands.variance, number))
        scale = operands.scale
        if scale is not None:
            scale = scale + (lane.head * plan.groups).wide() * 4
        if plan.signed:
            assert operands.signs is not None
            signs = [_signs(lane, operands.signs, number) for number in range(plan.operands)]
            fixed = [_signed_columns(lane, scale, number) for number in range(plan.operands)]
            return cls(lane, None, None, [], fixed, signs, variance)

        assert operands.queries is not None and operands.fragments is not None
        assert operands.norm is not None
        transform = lane.head
        if plan.stacked_transform:
            transform = lane.layer * plan.kv_heads + lane.head
        reader = QueryReader(
            plan,
            lane.row,
            lane.column,
            block.warp,
            block.shared,
            operands.queries + (lane.head_index() * plan.groups).wide() * (4 * plan.head_dim),
            operands.fragments + transform.wide() * plan.transform_bytes,
            scale,
            ptx.load(operands.norm + transform.wide() * 4)[0].as_float(),
        )
        if plan.period is not None:
            assert operands.mean is not None and operands.frequencies is not None
            mean = operands.mean + lane.head.wide() * (4 * plan.head_dim)
            turned = BlockQueries(reader, mean, operands.frequencies)
            restore = turned.prepare(block)
            ptx.barrier()
            fixed = [
                Columns(reader.factor(own, reader.load_scales(number)), [], [])
                for number, own in enumerate(restore)
            ]
            return cls(lane, reader, turned, restore, fixed, [], variance)

        # All loads begin before the first result is needed.
        fragments = reader.load_fragments(block.warp, reader.fragments)
        scales = [reader.load_scales(number) for number in range(plan.operands)]
        loaded = [
            reader.load_normalised(reader.row + COLUMNS * number, plan.groups)
            for number in range(plan.operands)
        ]
        reader.transform(
            _pack_rows([channels for channels, _ in loaded]),
            block.warp,
            plan.warps,
            reader.region(0),
            reader.fragments,
            fragments,
        )
        ptx.barrier()
        fixed = []
        for number, (_, own) in enumerate(loaded):
            factor = reader.factor(own, scales[number])
            total = reader.sum_all(reader.region(0, number))
            base_logit = [x * y * 0.5 for x, y in zip(total, factor, strict=True)]
            fixed.append(Columns(factor, base_logit, [F32.constant(0.0)] * 2))
        return cls(lane, reader, None, [], fixed, [], variance)

    def logits(
        self,
        index: I32,
        tile: I32,
        words: list[list[I32]],
        scalars: list[I32],
        reference: list[list[F32]],
    ) -> list[list[list[F32]]]:
        """Logits of the lane's four tokens and two columns of each operand.

        Args:
            index: of the tile in the warp's sequence.
            tile: its number.
            words: for each read, those of the tokens.
            scalars: of the tokens, packed; empty where keys have none.
            reference: for each operand and column, what is taken off.
        """
        plan = self.lane.plan
        unpacked = None
        if scalars:
            first, second = scalars
            unpacked = [
                bits.as_float()
                for bits in (first << 16, first & -65536, second << 16, second & -65536)
            ]
        regions, columns = self._operands(index, tile)
        energies = self._energies(words) if self.variance and plan.planes == 2 else None
        result = []
        for number, column in enumerate(columns):
            sums = self._sums(words, number, regions)
            result.append(
                [
                    [
                        self._logit(sums[token][e], column, number, e, token, unpacked, energies)
                        - reference[number][e]
                        for e in range(2)
                    ]
                    for token in range(4)
                ]
            )
        return result

    def begin(self, index: I32, tile: I32) -> None:
        """Turns the queries, if that must be done before a tile.

        Args:
            index: of the tile in the warp's sequence.
            tile: its number.
        """
        turned = self.turned
        if turned is not None:
            factors = [columns.factor for columns in self.fixed]
            first = self._position(index).equals(0)
            when(first, lambda: turned.update(tile, self.restore, factors))

    def _position(self, index: I32) -> I32:
        """Place of a tile among those whose operands are computed at once."""
        group = self.lane.plan.tiles_per_group
        return index % group if group > 1 else I32.constant(0)

    def _operands(self, index: I32, tile: I32) -> tuple[list[I32], list[Columns]]:
        """Address of each operand that the tile meets, and what is known of its columns."""
        plan, reader = self.lane.plan, self.reader
        if self.turned is None:
            regions = [] if reader is None else [reader.region(0, n) for n in range(plan.operands)]
            return regions, self.fixed
        assert reader is not None
        turned, position = self.turned, self._position(index)
        regions, columns = [], []
        for number in range(plan.operands):
            chosen: I32 | int = number
            parity: I32 | int = 0
            if plan.operands == 1:
                chosen = position // plan.tiles_per_set
                parity = position % plan.tiles_per_set // plan.tiles_per_block
            base0, base1, bias0, bias1 = turned.columns(chosen, parity)
            columns.append(Columns(self.fixed[number].factor, [base0, base1], [bias0, bias1]))
            region = reader.region(reader.warp)
            per_set = plan.key_reads * 2048
            step = I32.constant(chosen * per_set) if isinstance(chosen, int) else chosen * per_set
            regions.append(region + step)
        return regions, columns

    def _sums(self, reads: list[list[I32]], number: int, regions: list[I32]) -> list[list[F32]]:
        """Sums over set bits, or numbers of bits in which signs agree, by token and column."""
        plan = self.lane.plan
        by_token: list[list[F32]] = []
        operand = []
        if self.reader is not None:
            operand = [self.reader.operand(regions[number], read) for read in range(plan.key_reads)]
        if plan.halved:
            # Lanes of the second two columns take the upper halves of the bytes.
            shift = (self.lane.column >> 1) * plan.bit_steps
            reads = [[word >> shift for word in read] for read in reads]
        for half in range(2):
            words = [read[2 * half : 2 * half + 2] for read in reads]
            if self.reader is not None:
                total = self.reader.sum_set_bits(words, operand)
            else:
                agree = [I32.constant(_INTEGER_BITS)] * 4
                for pair, (sign, opposite) in zip(words, self.signs[number], strict=True):
                    agree = ptx.multiply_bits(pair, sign, agree)
                    agree = ptx.multiply_bits([~word for word in pair], opposite, agree)
                total = [x.as_float() - _INTEGER_FLOAT for x in agree]
            by_token += [total[:2], total[2:]]
        return by_token

    def _logit(
        self,
        total: F32,
        column: Columns,
        number: int,
        e: int,
        token: int,
        scalars: list[F32] | None,
        energies: list[F32] | None,
    ) -> F32:
        logit = ptx.fma(total, column.factor[e], -column.base[e])
        if scalars is not None:
            scalar = scalars[token]
            if self.variance:
                energy = scalar * (
                    energies[token] if energies is not None else float(self.lane.plan.bits)
                )
                logit = ptx.fma(-energy, self.variance[number][e], logit)
            return ptx.fma(logit, scalar, column.bias[e])
        return logit + column.bias[e]

    def _energies(self, reads: list[list[I32]]) -> list[F32]:
        """‖code‖² of the lane's tokens, whose components are `2a + a'`: `4.5·bits - 8·differing`.

        Bits `i` and `i + bits/2` lie four bits apart in the same byte.
        """
        plan, lane = self.lane.plan, self.lane
        # Four counts of at most 128 share a word.
        counts = I32.constant(0)
        for read, words in enumerate(reads):
            own = (lane.column + 4 * read).less(plan.key_words)
            for token, word in enumerate(words):
                differing = ptx.population_count((word ^ (word >> 4)) & 0x0F0F0F0F)
                counts = counts + (select(own, differing, I32.constant(0)) << (8 * token))
        for mask in (1, 2):
            counts = counts + ptx.shuffle_xor(counts, mask)
        return [
            ptx.fma(
                ((counts >> (8 * token)) & 255).to_float(),
                F32.constant(-8.0),
                F32.constant(4.5 * plan.bits),
            )
            for token in range(4)
        ]


def _pack_rows(queries: list[list[F32]]) -> list[list[I32]]:
    """Operands of 16 queries for every slice of 16 channels, of which a lane has two or one."""
    zero = I32.constant(0)
    packed = [
        [ptx.pack_halves(*channels[index : index + 2]) for index in range(0, len(channels), 2)]
        for channels in queries
    ]
    if len(packed) == 1:
        packed.append([zero] * len(packed[0]))
    low, high = packed
    return [
        [low[index], high[index], low[index + 1], high[index + 1]]
        for index in range(0, len(low), 2)
    ]


def _variance(lane: Lane, address: I64, number: int) -> list[F32]:
    plan = lane.plan
    result = []
    for e in range(2):
        head = (lane.column * 2 + e) & (plan.stride - 1)
        known = (head + number * COLUMNS).minimum(plan.groups - 1)
        place = address + (lane.head_index() * plan.groups + known).wide() * 4
        result.append(ptx.load(place)[0].as_float() * LOG2_E)
    return result


def _signs(lane: Lane, address: I64, number: int) -> list[tuple[I32, I32]]:
    """Signs of the query at the lane's row, as the operand's column of that number."""
    plan = lane.plan
    head = lane.row + number * COLUMNS
    query = lane.head_index() * plan.groups + head.minimum(plan.groups - 1)
    pairs = []
    for read in range(plan.key_reads):
        word = lane.column + 4 * read
        place = address + (query * plan.key_words + word.minimum(plan.key_words - 1)).wide() * 4
        known = head.less(plan.groups) & word.less(plan.key_words)
        signs = ptx.load(place)[0]
        zero = I32.constant(0)
        pairs.append((select(known, signs, zero), select(known, ~signs, zero)))
    return pairs


def _signed_columns(lane: Lane, scale: I64 | None, number: int) -> Columns:
    """Of `n` bits that agree the sum over signs is `2n - bits`."""
    plan = lane.plan
    factor = []
    for e in range(2):
        if scale is None:
            assert plan.scale is not None
            own = F32.constant(plan.scale)
        else:
            head = (lane.column * 2 + e + number * COLUMNS).minimum(plan.groups - 1)
            own = ptx.load(scale + head.wide() * 4)[0].as_float()
        factor.append(own * (2 * LOG2_E))
    base = [x * (0.5 * plan.bits) for x in factor]
    return Columns(factor, base, [F32.constant(0.0)] * 2)
