"""The kernel: online softmax over blocks of tokens."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float32

from pallas_kernels.sketch_attention.tpu import block_rope, scores, values
from pallas_kernels.sketch_attention.tpu.block_rope import RopeOperands
from pallas_kernels.sketch_attention.tpu.operands import FACTOR, OFFSET, VARIANCE
from pallas_kernels.sketch_attention.tpu.plan import LANES, Plan
from pallas_kernels.sketch_attention.tpu.scalars import split_pair, unpair

LOWEST = -1e30
"""Stands for the logit of a hidden token: finite, so that differences are."""

_LN_2 = float(np.log(2.0))
_BYTES = 4


class Inputs(NamedTuple):
    """What a grid step reads: arrays or the refs to them, in order.

    Attributes:
        layer: one number.
        stop: of each row.
        constants: `row_constants`.
        coefficients: `query_operands`; None where queries are turned.
        turned: `rope_operands`; None where they are not.
        key_words: of all layers, as all that follow.
        key_scales: None where keys have none.
        value_words: codes.
        value_affine: their scales and zeros.
    """

    layer: Any
    stop: Any
    constants: Any
    coefficients: Any
    turned: RopeOperands | None
    key_words: Any
    key_scales: Any
    value_words: Any
    value_affine: Any


class Outputs(NamedTuple):
    """Where the last grid step of a row writes."""

    output: Any
    lse: Any


class State(NamedTuple):
    """What a row carries from one block of tokens to the next, and room to work.

    Attributes:
        highest: the largest logit so far, in powers of two, in every lane.
        total: the sum of weights.
        weighted: the sum of weighted values.
        products: of the bytes of weights with codes, to be read byte by byte.
    """

    highest: Any
    total: Any
    weighted: Any
    products: Any


class Rows(NamedTuple):
    """One number per token and head of a block, as float32.

    Attributes:
        norm: the key's scalar; None where keys have none.
        code_norm: what multiplies the variance besides the norm; None where nothing does.
        step: scale of the value.
        zero: zero of the value.
    """

    norm: Float32[Array, "heads tokens"] | None
    code_norm: Float32[Array, "heads tokens"] | None
    step: Float32[Array, "heads tokens"]
    zero: Float32[Array, "heads tokens"]


def attend(plan: Plan, inputs: Inputs, outputs: Outputs, state: State) -> None:
    """The body of a grid step."""
    row, index = pl.program_id(0), pl.program_id(2)
    stop = inputs.stop[row]
    first = index * plan.block

    @pl.when(index == 0)
    def _() -> None:
        state.highest[...] = jnp.full(state.highest.shape, LOWEST, jnp.float32)
        state.total[...] = jnp.zeros(state.total.shape, jnp.float32)
        state.weighted[...] = jnp.zeros(state.weighted.shape, jnp.float32)

    whole = (first >= plan.start) & (first + plan.block <= jnp.minimum(stop, plan.tokens))
    some = (first < stop) & (first + plan.block > plan.start) & (stop > plan.start)

    @pl.when(whole)
    def _() -> None:
        _attend_block(plan, inputs, state, None)

    @pl.when(some & ~whole)
    def _() -> None:
        position = first + lax.broadcasted_iota(jnp.int32, (plan.rows, plan.block), 1)
        end = jnp.minimum(stop, plan.tokens)
        _attend_block(plan, inputs, state, (position >= plan.start) & (position < end))

    @pl.when(index == plan.blocks - 1)
    def _() -> None:
        for head in range(plan.step_heads):
            total = state.total[head]
            empty = total == 0.0
            divisor = jnp.where(empty, 1.0, total)
            lse = (state.highest[head] + jnp.log2(divisor)) * _LN_2
            outputs.lse[0, head] = jnp.where(empty, -jnp.inf, lse)
            outputs.output[0, head] = state.weighted[head] / divisor[:, :1]


def _attend_block(
    plan: Plan, inputs: Inputs, state: State, visible: Bool[Array, "rows tokens"] | None
) -> None:
    """Adds a block of tokens to the state; `visible` is None where all of them are."""
    words = inputs.key_words[...]
    rows = _rows(plan, inputs, None if visible is None else visible[:1])
    means = None
    if inputs.turned is not None:
        constants = [inputs.constants[0, head] for head in range(plan.step_heads)]
        products = block_rope.turned_products(inputs.turned, constants, words, plan)
        means = block_rope.mean_logits(inputs.turned, plan)
    elif plan.method == "popcount":
        products = scores.compared([*inputs.coefficients[0]], words, plan)
    else:
        tiles = [inputs.coefficients[0, tile] for tile in range(len(plan.key_tiles))]
        products = scores.multiplied(tiles, words, plan)
    for head, product in enumerate(products):
        logits = _logits(plan, product, inputs.constants[0, head], rows, head)
        if means is not None:
            logits = logits + means[head]
        if visible is not None:
            logits = jnp.where(visible, logits, LOWEST)
        before = state.highest[head][:, :1]
        highest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        weight = jnp.exp2(logits - highest)
        decay = jnp.exp2(before - highest)
        total = jnp.sum(weight, axis=1, keepdims=True)
        state.total[head] = state.total[head] * decay + total
        state.highest[head] = jnp.broadcast_to(highest, state.highest.shape[1:])
        block = _weighted_values(plan, inputs, state, weight, rows, head)
        state.weighted[head] = state.weighted[head] * decay + block


def _rows(plan: Plan, inputs: Inputs, visible: Bool[Array, "1 tokens"] | None) -> Rows:
    # Beyond the capacity a block holds anything, even what is no number.
    def hide(numbers: Float32[Array, "heads tokens"]) -> Float32[Array, "heads tokens"]:
        return numbers if visible is None else jnp.where(visible, numbers, 0.0)

    step, zero = split_pair(inputs.value_affine[...])
    norm = code_norm = None
    if plan.scaled:
        norm = hide(unpair(inputs.key_scales[...]))
    if plan.variance:
        assert norm is not None
        code_norm = norm
        if plan.code_planes == 2:
            norms = scores.squared_code_norms(inputs.key_words[...], plan)
            code_norm = norm * norms.astype(jnp.float32)
    return Rows(norm, code_norm, hide(step), hide(zero))


def _logits(
    plan: Plan,
    product: Array,
    constants: Float32[Array, "rows lanes"],
    rows: Rows,
    head: int,
) -> Float32[Array, "rows tokens"]:
    """Logits in powers of two."""
    logits = product.astype(jnp.float32) * constants[:, FACTOR : FACTOR + 1]
    if plan.period is None:
        logits = logits - constants[:, OFFSET : OFFSET + 1]
    if rows.code_norm is not None:
        variance = constants[:, VARIANCE : VARIANCE + 1]
        logits = logits - variance * _row(rows.code_norm, head, plan)
    return logits if rows.norm is None else logits * _row(rows.norm, head, plan)


def _weighted_values(
    plan: Plan,
    inputs: Inputs,
    state: State,
    weight: Float32[Array, "rows tokens"],
    rows: Rows,
    head: int,
) -> Float32[Array, "rows channels"]:
    """The sum over the block of `weight · (zero + step · code)`."""
    scaled = weight * _row(rows.step, head, plan)
    # Integers are relative to the largest product, so that a value of large scale and no weight
    # does not coarsen the others.
    largest = jnp.max(scaled, axis=1, keepdims=True)
    unit = largest * (1.0 / values.HIGHEST_WEIGHT)
    inverse = jnp.where(largest > 0, values.HIGHEST_WEIGHT / largest, 0.0)
    first = head * plan.value_words
    codes = values.unpack_codes(inputs.value_words[first : first + plan.value_words], plan)
    products = values.multiply(values.weight_bytes(scaled * inverse), codes)
    sums = []
    for part, first in enumerate(range(0, plan.channels, LANES)):
        columns = products[:, first : first + LANES]
        width = columns.shape[1]
        state.products[head, part, :, :width] = columns
        by_byte = [
            state.products[head, part, pl.ds(byte, plan.rows, stride=_BYTES), :width]
            for byte in range(_BYTES)
        ]
        sums.append(values.add_bytes(by_byte))
    zero = jnp.sum(weight * _row(rows.zero, head, plan), axis=1, keepdims=True)
    return jnp.concatenate(sums, axis=1) * unit + zero


def _row(numbers: Float32[Array, "heads tokens"], head: int, plan: Plan) -> Array:
    return jnp.broadcast_to(numbers[head : head + 1], (plan.rows, plan.block))


def call(
    plan: Plan, inputs: Inputs
) -> tuple[Float32[Array, "batch kv_heads rows channels"], Float32[Array, "batch kv_heads rows"]]:
    """Runs the kernel over the grid: output and log-sum-exp."""
    heads, block = plan.step_heads, plan.block
    first_block = plan.start // block

    def block_of(index: Array, stop: Array) -> Array:
        # A grid step that sees nothing asks for what the step before it has, or the one after it
        # wants, so that nothing is fetched for it.
        last = lax.div(jnp.maximum(stop, 1) - 1, block)
        return jnp.clip(index, first_block, jnp.clip(last, first_block, plan.blocks - 1))

    def stored(rows: int, tokens: int) -> pl.BlockSpec:
        def place(row: Array, step: Array, index: Array, layer: Any, stop: Any) -> tuple:
            return layer[0], row, step, block_of(index, stop[row])

        return pl.BlockSpec((None, None, rows, tokens), place)

    def per_row(*shape: int) -> pl.BlockSpec:
        zeros = (0,) * (len(shape) - 1)
        return pl.BlockSpec((1, *shape), lambda row, step, index, layer, stop: (row, step, *zeros))

    def same(array: Array) -> pl.BlockSpec:
        zeros = (0,) * array.ndim
        return pl.BlockSpec(array.shape, lambda row, step, index, layer, stop: zeros)

    def per_step(array: Array) -> pl.BlockSpec:
        zeros = (0,) * (array.ndim - 1)
        return pl.BlockSpec(
            (heads, *array.shape[1:]), lambda row, step, index, layer, stop: (step, *zeros)
        )

    def per_block(array: Array) -> pl.BlockSpec:
        zeros = (0,) * (array.ndim - 1)

        def place(row: Array, step: Array, index: Array, layer: Any, stop: Any) -> tuple:
            return block_of(index, stop[row]), *zeros

        return pl.BlockSpec((1, *array.shape[1:]), place)

    coefficients = turned = None
    if inputs.turned is None:
        first_axis = heads if plan.method == "popcount" else len(plan.key_tiles)
        coefficients = per_row(first_axis, *inputs.coefficients.shape[2:])
    else:
        turned = RopeOperands(
            vectors=per_row(heads, *inputs.turned.vectors.shape[2:]),
            transforms=per_step(inputs.turned.transforms),
            mean=per_step(inputs.turned.mean),
            first_turn=per_block(inputs.turned.first_turn),
            turns=same(inputs.turned.turns),
            mean_turns=same(inputs.turned.mean_turns),
        )
    specs = Inputs(
        layer=None,
        stop=None,
        constants=per_row(heads, plan.rows, LANES),
        coefficients=coefficients,
        turned=turned,
        key_words=stored(heads * plan.key_words, block),
        key_scales=stored(2 * heads, block // 2) if plan.scaled else None,
        value_words=stored(heads * plan.value_words, block),
        value_affine=stored(heads, block),
    )
    operands, structure = jax.tree.flatten(inputs)
    outputs = Outputs(
        jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, plan.rows, plan.channels), jnp.float32),
        jax.ShapeDtypeStruct((plan.batch, plan.kv_heads, plan.rows, LANES), jnp.float32),
    )
    parts = -(-plan.channels // LANES)
    state = State(
        highest=pltpu.VMEM((heads, plan.rows, LANES), jnp.float32),
        total=pltpu.VMEM((heads, plan.rows, LANES), jnp.float32),
        weighted=pltpu.VMEM((heads, plan.rows, plan.channels), jnp.float32),
        products=pltpu.VMEM((heads, parts, _BYTES * plan.rows, LANES), jnp.int32),
    )

    def body(*refs: Any) -> None:
        read, written = len(operands), len(operands) + len(outputs)
        given = jax.tree.unflatten(structure, refs[:read])
        attend(plan, given, Outputs(*refs[read:written]), State(*refs[written:]))

    output, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.batch, plan.steps, plan.blocks),
            in_specs=jax.tree.leaves(specs),
            out_specs=[per_row(heads, *array.shape[2:]) for array in outputs],
            scratch_shapes=list(state),
        ),
        out_shape=list(outputs),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES,
        ),
        name="sketch_attention",
    )(*operands)
    return output, lse[..., 0]


VMEM_BYTES = 64 << 20
"""Of the 128 MiB that the chips from v5e on have."""
