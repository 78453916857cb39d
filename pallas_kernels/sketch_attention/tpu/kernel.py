"""The kernel: online softmax over blocks of tokens."""

from functools import reduce
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

_LEAST_STEP = 2.0**-60
"""What smaller scales of values count as where weights are scaled: weights must stay finite."""
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
        reference: what is subtracted from logits, in powers of two, in every lane.
        total: the sum of weights.
        weighted: the sum of weighted values.
        products: of the bytes of weights with codes, to be read byte by byte.
        rows: scalars of the block.
    """

    reference: Any
    total: Any
    weighted: Any
    products: Any
    rows: "Rows"


class Rows(NamedTuple):
    """One number per token and head of a block, as float32.

    They lie in memory, because reading one row into all rows of a register costs no more than
    reading it, whereas repeating it occupies the vector unit.

    Attributes:
        norm: the key's scalar; None where keys have none.
        code_norm: what multiplies the variance besides the norm; None where nothing does.
        step: scale of the value.
        zero: zero of the value.
    """

    norm: Any  # Float32[Array, "heads tokens"] | None
    code_norm: Any  # Float32[Array, "heads tokens"] | None
    step: Any  # Float32[Array, "heads tokens"]
    zero: Any  # Float32[Array, "heads tokens"]


def attend(plan: Plan, inputs: Inputs, outputs: Outputs, state: State) -> None:
    """The body of a grid step."""
    row, index = pl.program_id(0), pl.program_id(2)
    stop = inputs.stop[row]
    first = index * plan.block

    @pl.when(index == 0)
    def _() -> None:
        state.reference[...] = jnp.full(state.reference.shape, LOWEST, jnp.float32)
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
            lse = (state.reference[head] + jnp.log2(divisor)) * _LN_2
            outputs.lse[0, head] = jnp.where(empty, -jnp.inf, lse)
            outputs.output[0, head] = state.weighted[head] / divisor[:, :1]


def _attend_block(
    plan: Plan, inputs: Inputs, state: State, visible: Bool[Array, "rows tokens"] | None
) -> None:
    """Adds a block of tokens to the state; `visible` is None where all of them are."""
    words = inputs.key_words[...]
    rows = state.rows
    _read_rows(plan, inputs, rows, None if visible is None else visible[:1])
    largest_steps = jnp.log2(jnp.maximum(_largest_by_lane(rows.step[...]), _LEAST_STEP))
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
        # Weights are relative to a bound of the largest one times its value's scale, so that all
        # such products have their place in `values.weight_bytes`. A value of large scale and no
        # weight does not coarsen the others unless it shares a lane with a large weight.
        bounds = _largest_by_lane(logits) + largest_steps[head : head + 1]
        bound = jnp.max(bounds, axis=1, keepdims=True)
        before = state.reference[head][:, :1]
        reference = jnp.maximum(before, bound - values.WEIGHT_BITS)
        weight = jnp.exp2(logits - reference)
        decay = jnp.exp2(before - reference)
        total = jnp.sum(weight, axis=1, keepdims=True)
        state.total[head] = state.total[head] * decay + total
        state.reference[head] = jnp.broadcast_to(reference, state.reference.shape[1:])
        block = _weighted_values(plan, inputs, state, weight, head)
        state.weighted[head] = state.weighted[head] * decay + block


def _read_rows(
    plan: Plan, inputs: Inputs, rows: Rows, visible: Bool[Array, "1 tokens"] | None
) -> None:
    # Beyond the capacity a block holds anything, even what is no number.
    def hide(numbers: Float32[Array, "heads tokens"]) -> Float32[Array, "heads tokens"]:
        return numbers if visible is None else jnp.where(visible, numbers, 0.0)

    step, zero = split_pair(inputs.value_affine[...])
    rows.step[...] = hide(step)
    rows.zero[...] = hide(zero)
    if plan.scaled:
        norm = hide(unpair(inputs.key_scales[...]))
        rows.norm[...] = norm
    if plan.variance:
        assert plan.scaled
        if plan.code_planes == 2:
            norms = scores.squared_code_norms(inputs.key_words[...], plan)
            norm = norm * norms.astype(jnp.float32)
        rows.code_norm[...] = norm


def _largest_by_lane(
    numbers: Float32[Array, "rows tokens"],
) -> Float32[Array, "rows lanes"]:
    columns = range(0, numbers.shape[1], LANES)
    return reduce(jnp.maximum, (numbers[:, first : first + LANES] for first in columns))


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
    head: int,
) -> Float32[Array, "rows channels"]:
    """The sum over the block of `weight · (zero + step · code)`."""
    first = head * plan.value_words
    codes = values.unpack_codes(inputs.value_words[first : first + plan.value_words], plan)
    scaled = weight * _row(state.rows.step, head, plan)
    products = values.multiply(values.weight_bytes(scaled), codes)
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
    zero = jnp.sum(weight * _row(state.rows.zero, head, plan), axis=1, keepdims=True)
    return jnp.concatenate(sums, axis=1) + zero


def _row(numbers: Any, head: int, plan: Plan) -> Float32[Array, "rows tokens"]:
    """A row, repeated for every query: the compiler repeats as it loads, by single registers."""
    parts = [
        numbers[head : head + 1, first : first + LANES] for first in range(0, plan.block, LANES)
    ]
    return jnp.concatenate([jnp.broadcast_to(part, (plan.rows, LANES)) for part in parts], axis=1)


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
    row = pltpu.VMEM((heads, block), jnp.float32)
    state = State(
        reference=pltpu.VMEM((heads, plan.rows, LANES), jnp.float32),
        total=pltpu.VMEM((heads, plan.rows, LANES), jnp.float32),
        weighted=pltpu.VMEM((heads, plan.rows, plan.channels), jnp.float32),
        products=pltpu.VMEM((heads, parts, _BYTES * plan.rows, LANES), jnp.int32),
        rows=Rows(
            norm=row if plan.scaled else None,
            code_norm=row if plan.variance else None,
            step=row,
            zero=row,
        ),
    )
    scratch, scratch_structure = jax.tree.flatten(state)

    def body(*refs: Any) -> None:
        read, written = len(operands), len(operands) + len(outputs)
        given = jax.tree.unflatten(structure, refs[:read])
        kept = jax.tree.unflatten(scratch_structure, refs[written:])
        attend(plan, given, Outputs(*refs[read:written]), kept)

    output, lse = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.batch, plan.steps, plan.blocks),
            in_specs=jax.tree.leaves(specs),
            out_specs=[per_row(heads, *array.shape[2:]) for array in outputs],
            scratch_shapes=scratch,
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
