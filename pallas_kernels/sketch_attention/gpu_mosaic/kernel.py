"""The kernel: each warp attends to tiles of 32 tokens of one row and KV head.

Tokens are rows and query heads are columns of the first product, whose result is turned in place
into an operand of the second, in which channels of values are rows. Warps share nothing until
all tiles are read, so no warp waits for another.
"""

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.launch import Block
from pallas_kernels.mosaic_gpu.merging import Column, over_rows
from pallas_kernels.mosaic_gpu.registers import F32, I32, branch, select
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.sequence import Sequence
from pallas_kernels.mosaic_gpu.softmax import Softmax
from pallas_kernels.sketch_attention.gpu_mosaic.lane import Lane, Operands
from pallas_kernels.sketch_attention.gpu_mosaic.plan import TILE, Plan
from pallas_kernels.sketch_attention.gpu_mosaic.scores import Scores
from pallas_kernels.sketch_attention.gpu_mosaic.tiles import KeyReader, TileCopier
from pallas_kernels.sketch_attention.gpu_mosaic.values import ValueLayout, ValueReader


def attend(plan: Plan, block: Block, place: I32, split: I32, operands: Operands) -> None:
    """The body of the kernel, see `launch_attention`."""
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
