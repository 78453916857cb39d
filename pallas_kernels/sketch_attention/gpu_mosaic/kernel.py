"""The kernel: each warp attends to tiles of 32 tokens of one row and KV head.

Tokens are rows and query heads are columns of the first product, whose result is turned in place
into an operand of the second, in which channels of values are rows. Warps share nothing until
all tiles are read, so no warp waits for another.
"""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.launch import Block
from pallas_kernels.mosaic_gpu.merging import Column, over_rows
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, branch, select, when
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.sequence import Sequence
from pallas_kernels.mosaic_gpu.softmax import Softmax
from pallas_kernels.sketch_attention.gpu_mosaic.block_rope import BlockQueries
from pallas_kernels.sketch_attention.gpu_mosaic.coefficients import LOG2_E, Columns, QueryReader
from pallas_kernels.sketch_attention.gpu_mosaic.plan import COLUMNS, TILE, Plan
from pallas_kernels.sketch_attention.gpu_mosaic.tiles import KeyReader, TileCopier
from pallas_kernels.sketch_attention.gpu_mosaic.values import ValueLayout, ValueReader

# An integer added to these bits is the float of 2²³ plus that integer.
_INTEGER_BITS = 0x4B000000
_INTEGER_FLOAT = 8388608.0


@dataclass(frozen=True)
class Operands:
    """Byte addresses of what a call reads and writes; None for what it does not have."""

    layer: I64
    stop: I64
    key_words: I64
    key_scales: I64 | None
    value_words: I64
    value_affine: I64
    scale: I64
    queries: I64 | None
    fragments: I64 | None
    norm: I64 | None
    signs: I64 | None
    variance: I64 | None
    frequencies: I64 | None
    mean: I64 | None
    output: I64
    lse: I64


def attend(plan: Plan, block: Block, operands: Operands) -> None:
    """The body of the kernel, for the grid `(splits, batch · kv_heads)`."""
    split, place = block.index
    layer = ptx.load(operands.layer)[0]
    head = place % plan.kv_heads
    batch = place // plan.kv_heads
    stop = ptx.load(operands.stop + batch.wide() * 4)[0].minimum(plan.tokens)
    lane = Lane(plan, block, operands, layer, batch, head)
    sequence = Sequence.of(
        plan.start,
        stop,
        TILE,
        worker=split * plan.warps + block.warp,
        workers=plan.splits * plan.warps,
        group=plan.tiles_per_group,
    )
    copier = TileCopier.of(lane, sequence)
    ring = Ring(
        block.shared + (block.warp * (plan.stages * plan.tile_bytes) + plan.shared.tiles),
        plan.stages,
        plan.tile_bytes,
        sequence.count,
        copier.copy,
    )
    ring.start()
    # The first tiles are under way while queries are transformed.
    scores = Scores.prepare(lane)
    keys = KeyReader.of(lane)
    layout = ValueLayout.of(plan.head_dim, plan.value_bits)
    values = ValueReader.of(layout, plan.key_words, lane.row, lane.column)
    softmax = Softmax.empty(plan.operands, len(layout.planes) // 2)

    def consume(index: I32, place: I32, registers: list) -> list:
        state = softmax.with_registers(registers)
        tile = sequence.at(index)
        # Before the tile is loaded, while more registers are free.
        scores.begin(index, tile)
        words, affine, scalars = keys.load(place)
        codes = values.load(place)
        logits = scores.logits(index, tile, words, scalars, state.reference)
        state, logits, affine = _keep_in_range(
            plan, sequence, index, tile, lane, state, logits, affine
        )
        return _accumulate(state, logits, affine, codes, values).registers()

    registers = ring.run(softmax.registers(), consume)
    found = _found(lane, softmax.with_registers(registers), layout)
    plan.merging.write(
        block, lane.head_index() * plan.groups, split, found, operands.output, operands.lse
    )


@dataclass(frozen=True)
class Lane:
    """Where a thread stands in its warp, and what its block works on."""

    plan: Plan
    block: Block
    operands: Operands
    layer: I32
    batch: I32
    head: I32

    @property
    def row(self) -> I32:
        """Row of the lane, 0…7."""
        return self.block.lane >> 2

    @property
    def column(self) -> I32:
        """Column of the lane, 0…3."""
        return self.block.lane & 3

    @property
    def token(self) -> I32:
        """The first of four tokens of a tile whose keys the lane reads.

        Rows 2c and 2c + 1 meet the values that column c reads: four tokens from each half of the
        tile.
        """
        return (self.row >> 1) * 4 + (self.row & 1) * (TILE // 2)

    def stacked(self, base: I64, rows: int, row_words: int | None = None) -> I64:
        """Address of the block's rows in an array stacked over layers, rows and KV heads."""
        plan = self.plan
        index = (self.layer * plan.batch + self.batch) * plan.kv_heads + self.head
        return base + index.wide() * (4 * rows * (row_words or plan.tokens))

    def head_index(self) -> I32:
        """Index of the KV head among those of all rows of the batch."""
        return self.batch * self.plan.kv_heads + self.head


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
        scale = operands.scale + (lane.head * plan.groups).wide() * 4
        if plan.signed:
            assert operands.signs is not None
            signs = [_signs(lane, operands.signs, number) for number in range(plan.operands)]
            fixed = [_signed_columns(lane, scale, number) for number in range(plan.operands)]
            return cls(lane, None, None, [], fixed, signs, variance)

        assert operands.queries is not None and operands.fragments is not None
        assert operands.norm is not None
        fragment_bytes = plan.key_reads * 8 * plan.slices * 512
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
            operands.fragments + transform.wide() * fragment_bytes,
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


def _signed_columns(lane: Lane, scale: I64, number: int) -> Columns:
    """Of `n` bits that agree the sum over signs is `2n - bits`."""
    plan = lane.plan
    factor = []
    for e in range(2):
        head = (lane.column * 2 + e + number * COLUMNS).minimum(plan.groups - 1)
        factor.append(ptx.load(scale + head.wide() * 4)[0].as_float() * (2 * LOG2_E))
    base = [x * (0.5 * plan.bits) for x in factor]
    return Columns(factor, base, [F32.constant(0.0)] * 2)


def _keep_in_range(
    plan: Plan,
    sequence: Sequence,
    index: I32,
    tile: I32,
    lane: Lane,
    state: Softmax,
    logits: list[list[list[F32]]],
    affine: list[I32],
) -> tuple[Softmax, list[list[list[F32]]], list[I32]]:
    """Hides tokens that are not visible, and raises references where logits need it."""
    begin = tile * TILE
    # Tiles that may hold the first visible token of some column, and the last tile.
    early = begin.less(plan.start + TILE * plan.tiles_per_set)
    first = index.less(plan.tiles_per_set)
    last = sequence.stop.less(begin + TILE)
    edge = early | first | last
    needed = state.needs_raise(logits, affine).equals(1) | edge
    flat = [x for operand in logits for token in operand for x in token]

    def unflatten(values: list) -> list[list[list[F32]]]:
        rows = iter(values)
        return [[[next(rows), next(rows)] for _ in range(4)] for _ in logits]

    def adjust(values: list) -> list:
        shown = [sequence.visible(begin + lane.token + token) for token in range(4)]
        hidden = F32.constant(float("-inf"))
        seen = [
            [
                [select(shown[token], x, hidden) for x in columns]
                for token, columns in enumerate(operand)
            ]
            for operand in unflatten(values[: len(flat)])
        ]
        words = [
            select(visible, word, I32.constant(0))
            for visible, word in zip(shown, values[len(flat) : len(flat) + 4], strict=True)
        ]
        raised, moved = state.with_registers(values[len(flat) + 4 :]).raised(seen, words)
        return [
            *(x for operand in moved for token in operand for x in token),
            *words,
            *raised.registers(),
        ]

    result = branch(needed, [*flat, *affine, *state.registers()], adjust)
    return (
        state.with_registers(result[len(flat) + 4 :]),
        unflatten(result[: len(flat)]),
        result[len(flat) : len(flat) + 4],
    )


def _accumulate(
    state: Softmax,
    logits: list[list[list[F32]]],
    affine: list[I32],
    codes: list[I32],
    values: ValueReader,
) -> Softmax:
    """Adds a tile's tokens, whose logits are relative to the references."""
    zeros_of_values = [(word << 16).as_float() for word in affine]
    assert state.normaliser is not None
    scales = [(word & -65536).as_float() * state.normaliser for word in affine]
    total = [list(columns) for columns in state.total]
    zeros = [list(columns) for columns in state.zeros]
    sums = [[list(tile) for tile in tiles] for tiles in state.sums]
    operands = []
    for number, tokens in enumerate(logits):
        halves = []
        for token, columns in enumerate(tokens):
            weights = [ptx.exp2(x) for x in columns]
            for e, weight in enumerate(weights):
                total[number][e] = total[number][e] + weight
                zeros[number][e] = ptx.fma(weight, zeros_of_values[token], zeros[number][e])
            scaled = [weight * scales[token] for weight in weights]
            halves.append(ptx.transpose_halves(ptx.pack_halves(*scaled)))
        operands.append([halves[:2], halves[2:]])
    for half in range(2):
        for index, channels in enumerate(values.operands(codes, half)):
            for number in range(len(logits)):
                sums[number][index] = ptx.multiply_halves(
                    channels, operands[number][half], sums[number][index]
                )
    return Softmax(state.reference, state.floor, total, zeros, state.normaliser, sums)


def _found(lane: Lane, state: Softmax, layout: ValueLayout) -> list[list[Column]]:
    """What the warp found, for each operand and column of the lane."""
    assert state.normaliser is not None
    restore = ptx.reciprocal(state.normaliser)
    channels = [layout.channel(plane, lane.row) for plane in layout.planes]
    found = []
    for number, sums in enumerate(state.sums):
        columns = []
        for e in range(2):
            zeros = over_rows(state.zeros[number][e])
            values = [
                ptx.fma(sums[index // 2][e + 2 * (index % 2)], restore * plane.scale, zeros)
                for index, plane in enumerate(layout.planes)
            ]
            total = over_rows(state.total[number][e])
            columns.append(
                Column(state.reference[number][e], total, list(zip(channels, values, strict=True)))
            )
        found.append(columns)
    return found
