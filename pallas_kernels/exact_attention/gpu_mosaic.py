"""Decode attention over keys and values that are stored as they are, on Hopper and later.

The counterpart of the kernel over sketches: each warp attends to tiles of 16 tokens of one row
and KV head, with tokens as rows of the first product and channels of values as rows of the second.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt16

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.attention import launch_attention
from pallas_kernels.mosaic_gpu.launch import SHARED_BYTES, WARPS, Block, refusal_of_version
from pallas_kernels.mosaic_gpu.merging import Column, Merging, over_rows
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, Bool, branch, select
from pallas_kernels.mosaic_gpu.ring import Ring
from pallas_kernels.mosaic_gpu.sequence import Sequence
from pallas_kernels.mosaic_gpu.softmax import LOG2_E, Softmax
from pallas_kernels.mosaic_gpu.splitting import choose_splits, processors
from pallas_kernels.sketch_attention.partial import Partial

TILE = 16
_COLUMNS = 8
_OVERHEAD = 2.0
"""Cost of a block's start and end, in tiles of a warp."""
_MOST_GROUPS = 16


def refusal(
    query: Float[Array, "batch queries heads head_dim"],
    keys: UInt16[Array, "layers batch tokens channels"],
    dtype: jnp.dtype,
) -> str | None:
    """Why the kernel cannot run these arguments; None if it can."""
    version = refusal_of_version()
    if version is not None:
        return version
    _, queries, heads, head_dim = query.shape
    tokens, kv_heads = keys.shape[2], keys.shape[3] // head_dim
    if queries != 1:
        return f"it takes one query per row, not {queries}"
    if dtype != jnp.bfloat16 or query.dtype != jnp.bfloat16:
        return f"it takes bfloat16 queries, keys and values, not {query.dtype} and {dtype}"
    if tokens % TILE:
        return f"it reads {TILE} tokens at once, and rows have {tokens}"
    if heads // kv_heads > _MOST_GROUPS:
        return f"it takes up to {_MOST_GROUPS} query heads per KV head, not {heads // kv_heads}"
    if head_dim % 16 or head_dim > 256:
        return f"it takes a head_dim of multiples of 16 up to 256, not {head_dim}"
    return None


@dataclass(frozen=True)
class _Plan:
    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    tokens: int
    start: int
    warpgroups: int
    stages: int
    splits: int

    @property
    def warps(self) -> int:
        return WARPS * self.warpgroups

    @property
    def operands(self) -> int:
        return -(-self.groups // _COLUMNS)

    @property
    def slices(self) -> int:
        return self.head_dim // 16

    @property
    def row_bytes(self) -> int:
        """Of a token in shared memory; odd in units of 16 bytes, so that rows differ in banks."""
        return 2 * self.head_dim + 16

    @property
    def tile_bytes(self) -> int:
        return 2 * TILE * self.row_bytes

    @property
    def merging(self) -> Merging:
        return Merging(
            warps=self.warps,
            columns=self.operands * _COLUMNS,
            groups=self.groups,
            stride=_COLUMNS,
            copies=1,
            head_dim=self.head_dim,
            splits=self.splits,
        )

    @property
    def shared_bytes(self) -> int:
        return max(self.warps * self.stages * self.tile_bytes, self.merging.shared_bytes)


def exact_attention(
    query: Float[Array, "batch 1 heads head_dim"],
    keys: UInt16[Array, "layers batch tokens channels"],
    values: UInt16[Array, "layers batch tokens channels"],
    layer: Int32[Array, ""],
    *,
    start: int,
    stop: Int32[Array, "batch 1"],
) -> Partial:
    """See `pallas_kernels.exact_attention.exact_attention`."""
    batch, _, heads, head_dim = query.shape
    tokens = keys.shape[2]
    kv_heads = keys.shape[3] // head_dim
    plan = _divide(_Plan(batch, kv_heads, heads // kv_heads, head_dim, tokens, start, 1, 1, 1))

    def body(block: Block, place: I32, split: I32, *addresses: I64) -> None:
        _attend(plan, block, place, split, *addresses)

    return launch_attention(
        body,
        (
            layer.reshape(1).astype(jnp.int32),
            stop.reshape(-1).astype(jnp.int32),
            query,
            keys,
            values,
        ),
        batch=batch,
        kv_heads=kv_heads,
        merging=plan.merging,
        shared_bytes=plan.shared_bytes,
    )


def _divide(plan: _Plan) -> _Plan:
    """The plan with as many warps and stages as fit and have work, and its splits."""
    short = plan.tokens <= TILE * WARPS
    choices = ((1, 3), (1, 2)) if short else ((2, 3), (2, 2), (1, 3), (1, 2))
    plan = next(
        divided
        for warpgroups, stages in choices
        if (divided := replace(plan, warpgroups=warpgroups, stages=stages)).shared_bytes
        <= SHARED_BYTES
    )
    splits = choose_splits(
        plan.batch * plan.kv_heads,
        slots=processors() * (SHARED_BYTES // plan.shared_bytes),
        tiles=plan.tokens / (TILE * plan.warps),
        overhead=_OVERHEAD,
    )
    return replace(plan, splits=splits)


def _attend(
    plan: _Plan,
    block: Block,
    place: I32,
    split: I32,
    layer: I64,
    stop: I64,
    queries: I64,
    keys: I64,
    values: I64,
    output: I64,
    lse: I64,
) -> None:
    batch, head = place // plan.kv_heads, place % plan.kv_heads
    end = ptx.load(stop + batch.wide() * 4)[0].minimum(plan.tokens)
    token_bytes = 2 * plan.kv_heads * plan.head_dim
    row = ptx.load(layer)[0] * plan.batch + batch
    base = row.wide() * (plan.tokens * token_bytes) + head.wide() * (2 * plan.head_dim)
    sequence = Sequence.of(
        plan.start,
        end,
        TILE,
        worker=split * plan.warps + block.warp,
        workers=plan.splits * plan.warps,
        group=1,
    )
    lane = block.lane

    def copy(index: I32, target: I32) -> None:
        offset = sequence.at(index).wide() * (TILE * token_bytes)
        pieces = plan.head_dim // 8
        for number, source in enumerate((keys, values)):
            for first in range(0, TILE * pieces, 32):
                piece = lane + first
                token, part = piece // pieces, piece % pieces
                own = source + base + offset + token.wide() * token_bytes + part * 16
                ptx.copy_async(target + (token + number * TILE) * plan.row_bytes + part * 16, own)

    ring = Ring(
        block.shared + block.warp * (plan.stages * plan.tile_bytes),
        plan.stages,
        plan.tile_bytes,
        sequence.count,
        copy,
    )
    ring.start()
    first_head = place * plan.groups
    operands = [_queries(plan, lane, queries, first_head, n) for n in range(plan.operands)]
    # Matrices 1 and 3 of a key operand are tokens 8…15, those of a value operand channels 8…15.
    key_place = (lane & 15) * plan.row_bytes + (lane >> 4) * 16
    value_place = ((lane & 7) + (lane >> 4) * 8 + TILE) * plan.row_bytes + ((lane >> 3) & 1) * 16
    softmax = Softmax.empty(plan.operands, plan.slices, scaled=False)

    def consume(index: I32, tile: I32, registers: list) -> list:
        state = softmax.with_registers(registers)
        logits = _logits(plan, tile + key_place, operands, state.reference)
        begin = sequence.at(index) * TILE
        edge = (
            index.equals(0)
            | begin.less(plan.start + TILE)
            | end.less(begin + TILE)
            | state.needs_raise(logits, []).equals(1)
        )
        state, logits = _keep_in_range(sequence, edge, begin + (lane >> 2), state, logits)
        return _accumulate(plan, state, logits, tile + value_place).registers()

    registers = ring.run(softmax.registers(), consume)
    found = _found(lane, softmax.with_registers(registers))
    plan.merging.write(block, first_head, split, found, output, lse)


def _queries(plan: _Plan, lane: I32, queries: I64, first_head: I32, number: int) -> list[list[I32]]:
    """The operand of eight queries for every slice of 16 channels; zero where there is no head."""
    head = (lane >> 2) + number * _COLUMNS
    present = head.less(plan.groups)
    place = (first_head + head.minimum(plan.groups - 1)).wide() * (2 * plan.head_dim)
    place = queries + place + (lane & 3) * 4
    zero = I32.constant(0)
    return [
        [select(present, ptx.load(place, 32 * part + 16 * half)[0], zero) for half in range(2)]
        for part in range(plan.slices)
    ]


def _logits(
    plan: _Plan, place: I32, operands: list[list[list[I32]]], reference: list[list[F32]]
) -> list[list[list[F32]]]:
    """Logits, in units of log 2, of the lane's two tokens and two columns of each operand."""
    sums = [[F32.constant(0.0)] * 4 for _ in operands]
    for part in range(plan.slices):
        keys = ptx.load_matrices(place, 32 * part)
        for number, queries in enumerate(operands):
            sums[number] = ptx.multiply_bfloats(keys, queries[part], sums[number])
    factor = F32.constant(LOG2_E / plan.head_dim**0.5)
    return [
        [[ptx.fma(total[2 * token + e], factor, -own[e]) for e in range(2)] for token in range(2)]
        for total, own in zip(sums, reference, strict=True)
    ]


def _keep_in_range(
    sequence: Sequence,
    needed: Bool,
    token: I32,
    state: Softmax,
    logits: list[list[list[F32]]],
) -> tuple[Softmax, list[list[list[F32]]]]:
    """Hides tokens that are not visible, and raises references where logits need it."""
    flat = [x for operand in logits for columns in operand for x in columns]

    def unflatten(values: list) -> list[list[list[F32]]]:
        rest = iter(values)
        return [[[next(rest), next(rest)] for _ in range(2)] for _ in logits]

    def adjust(values: list) -> list:
        shown = [sequence.visible(token + 8 * number) for number in range(2)]
        hidden = F32.constant(float("-inf"))
        seen = [
            [
                [select(shown[number], x, hidden) for x in columns]
                for number, columns in enumerate(operand)
            ]
            for operand in unflatten(values[: len(flat)])
        ]
        raised, moved = state.with_registers(values[len(flat) :]).raised(seen, [])
        return [x for operand in moved for columns in operand for x in columns] + (
            raised.registers()
        )

    result = branch(needed, [*flat, *state.registers()], adjust)
    return state.with_registers(result[len(flat) :]), unflatten(result[: len(flat)])


def _accumulate(plan: _Plan, state: Softmax, logits: list[list[list[F32]]], place: I32) -> Softmax:
    """Adds a tile's tokens, whose logits are relative to the references."""
    total = [list(columns) for columns in state.total]
    sums = [[list(tile) for tile in tiles] for tiles in state.sums]
    operands = []
    for number, tokens in enumerate(logits):
        halves = []
        for columns in tokens:
            weights = [ptx.exp2(x) for x in columns]
            total[number] = [x + y for x, y in zip(total[number], weights, strict=True)]
            halves.append(ptx.transpose_halves(ptx.pack_bfloats(*weights)))
        operands.append(halves)
    for part in range(plan.slices):
        channels = ptx.load_matrices(place, 32 * part, transposed=True)
        for number, weights_of_tokens in enumerate(operands):
            sums[number][part] = ptx.multiply_bfloats(
                channels, weights_of_tokens, sums[number][part]
            )
    return Softmax(state.reference, state.floor, total, state.zeros, None, sums)


def _found(lane: I32, state: Softmax) -> list[list[Column]]:
    """What the warp found, for each operand and column of the lane."""
    row = lane >> 2
    return [
        [
            Column(
                state.reference[number][e],
                over_rows(state.total[number][e]),
                [
                    (row + (16 * part + 8 * half), values[e + 2 * half])
                    for part, values in enumerate(sums)
                    for half in range(2)
                ],
            )
            for e in range(2)
        ]
        for number, sums in enumerate(state.sums)
    ]
