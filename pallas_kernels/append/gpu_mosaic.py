"""The append as one Mosaic GPU kernel, which writes into the cache where it lies.

A block of 16 warps has one KV head and four rows of the batch. Matrices are most of what it reads,
so all four rows share them: a warp takes eight lines of a matrix at a time, its lanes side by side
along them, and multiplies them by the vectors of all four.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from math import isfinite
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int32

from pallas_kernels.append.arguments import KeyEncoder, StoredTokens, Token
from pallas_kernels.append.lanes import Lane, Lanes
from pallas_kernels.packing import TOKEN_BLOCK, words_per_column

ROWS = 4
"""Rows of the batch in a block."""
WARPGROUPS = 4
"""Groups of four warps in a block; its warps are a multiple of `ROWS`."""

_WARPS = 4 * WARPGROUPS
_PARTS = _WARPS // ROWS
_THREADS = 32 * _WARPS
_OUTPUTS = 32 // ROWS
_WIDEST = 256
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_PLANES = {2: (2,), 3: (2, 1), 4: (4,)}


def refusal(stored: StoredTokens, encoder: KeyEncoder, token: Token) -> str | None:
    """Why this cannot run these arguments; None if it can. Only shapes and dtypes matter."""
    head_dim = token.keys.shape[-1]
    if head_dim % 32 or head_dim > _WIDEST:
        return f"head_dim {head_dim} is no multiple of 32 up to {_WIDEST}"
    for array in (token.keys, token.values, token.relative_keys):
        if array is not None and array.dtype not in _DTYPES:
            return f"keys and values of {array.dtype} are not floats of 16 or 32 bits"
    for parameter in jax.tree.leaves(encoder):
        if parameter.dtype != jnp.float32:
            return f"the encoder's parameters are {parameter.dtype}, not float32"
    if jax.__version_info__ < (0, 10, 2):
        return f"jax {jax.__version__} copies what a kernel reads; 0.10.2 does not"
    return None


def append_token(
    stored: StoredTokens, layer: Int32[Array, ""], encoder: KeyEncoder, token: Token
) -> StoredTokens:
    """See `pallas_kernels.append.append_token`."""
    batch, kv_heads, _ = token.keys.shape
    read, scratch = operands(layer, encoder, token), scratch_widths(encoder)
    # References are updated in place; arrays that a kernel returns would be new ones.
    updated = {name: jax.new_ref(array) for name, array in cache_arrays(stored).items()}
    names = (*read, *updated, *scratch)

    def emit(ctx: Any, head: Any, group: Any, *refs: Any) -> None:
        append_block(
            Lanes(),
            dict(zip(names, refs, strict=True)),
            Lane(head.registers.item()),
            Lane(group.registers.item()),
            encoder=encoder,
            value_bits=stored.values.bits,
            sinks=0 if stored.window is None else stored.window.sinks,
        )

    splat, ref = plgpu.Layout.WG_SPLAT, plgpu.RefType()
    inline = plgpu.inline_mgpu(arg_types=(splat, splat) + (ref,) * len(names))(emit)

    def append_token_kernel(*refs: Any) -> None:
        inline(lax.axis_index("head"), lax.axis_index("group"), *refs)

    kernel = plgpu.kernel(
        append_token_kernel,
        out_type=(),
        scratch_types=[plgpu.SMEM((ROWS, width), jnp.float32) for width in scratch.values()],
        grid=(kv_heads, -(-batch // ROWS)),
        grid_names=("head", "group"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )
    # Before jax 0.11 the batching rule around a kernel hides which references it updates.
    kernel.fun(*read.values(), *updated.values())
    return with_arrays(stored, {name: jax.freeze(ref) for name, ref in updated.items()})


def operands(layer: Int32[Array, ""], encoder: KeyEncoder, token: Token) -> dict[str, Array]:
    """What the kernel reads, by name."""
    relative = token.relative_keys
    arrays = {
        "layer": layer.reshape(1),
        "positions": token.positions,
        "exact_keys": None if relative is None else token.keys,
        "keys": token.keys if relative is None else relative,
        "values": token.values,
        "projection": encoder.projection,
        "mean": encoder.mean,
        "levels": encoder.levels,
        "weight": encoder.weight,
        "transform": encoder.transform,
        "metric": encoder.metric,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def cache_arrays(stored: StoredTokens) -> dict[str, Array]:
    """What the kernel writes, by name."""
    window = stored.window
    arrays = {
        "key_words": stored.keys.words,
        "key_scales": stored.keys.scales,
        "value_words": stored.values.words,
        "value_affine": stored.values.affine,
        "window_keys": None if window is None else window.keys,
        "window_values": None if window is None else window.values,
    }
    return {name: array for name, array in arrays.items() if array is not None}


def with_arrays(stored: StoredTokens, arrays: Mapping[str, Array]) -> StoredTokens:
    """The cache with what the kernel has written: the inverse of `cache_arrays`."""
    window = stored.window
    if window is not None:
        window = replace(window, keys=arrays["window_keys"], values=arrays["window_values"])
    return StoredTokens(
        keys=replace(stored.keys, words=arrays["key_words"], scales=arrays.get("key_scales")),
        values=replace(stored.values, words=arrays["value_words"], affine=arrays["value_affine"]),
        window=window,
    )


def scratch_widths(encoder: KeyEncoder) -> dict[str, int]:
    """The vectors of float32 that a block keeps in shared memory for each of its rows."""
    components, head_dim = encoder.projection.shape[-2:]
    widths = {"key": head_dim, "value": head_dim, "component": components}
    if encoder.metric is None:
        return widths
    return widths | {
        "sign": encoder.bits,
        "decoded": head_dim,
        "true": head_dim,
        "metric_true": head_dim,
    }


def append_block(
    t: Any,
    refs: Mapping[str, Any],
    head: Any,
    group: Any,
    *,
    encoder: KeyEncoder,
    value_bits: int,
    sinks: int,
) -> None:
    """What one block of threads does.

    Args:
        t: the operations, such as `Lanes`.
        refs: arrays by name: the operands, the arrays of the cache, and scratch in shared memory.
        head: the KV head.
        group: which `ROWS` rows of the batch.
        encoder: its static attributes count, its arrays are among `refs`.
        value_bits: width of a value's code.
        sinks: of the window.
    """
    batch, _, head_dim = t.shape(refs["keys"])
    capacity = t.shape(refs["key_words"])[3]
    components = t.shape(refs["component"])[1]
    layer = t.load(refs["layer"], 0)
    matrices = [refs[name] for name in ("projection", "metric", "transform") if name in refs]
    for matrix in matrices:
        _prefetch(t, matrix, layer, head)

    def row_of(member: Any) -> tuple[Any, Any, Any]:
        """A row of the batch, its token's position, and whether that is to be written."""
        wanted = group * ROWS + member
        row = t.select(wanted < batch, wanted, batch - 1)
        position = t.load(refs["positions"], row)
        inside = (position >= 0) & (position < capacity)
        return row, position, (wanted < batch) & inside

    def read_vectors() -> None:
        elements = ROWS * head_dim
        for first in range(0, elements, _THREADS):
            index = t.thread + first
            if first + _THREADS > elements:
                index = t.select(index < elements, index, elements - 1)
            member, channel = index // head_dim, index % head_dim
            row, position, inside = row_of(member)
            key = t.load(refs["keys"], row, head, channel)
            value = t.load(refs["values"], row, head, channel)
            t.store(refs["key"], key - t.load(refs["mean"], layer, head, channel), member, channel)
            t.store(refs["value"], value, member, channel)
            if "window_keys" not in refs:
                continue
            if "exact_keys" in refs:
                key = t.load(refs["exact_keys"], row, head, channel)
            ring = t.shape(refs["window_keys"])[2] - sinks
            slot = t.select(position < sinks, position, (position - sinks) % ring + sinks)
            with t.when(inside):
                where = (layer, row, slot, head * head_dim + channel)
                t.store(refs["window_keys"], t.to_bf16(key), *where)
                t.store(refs["window_values"], t.to_bf16(value), *where)

    # From here on a warp is one of the `_PARTS` that share a row.
    member, part = t.warp % ROWS, t.warp // ROWS
    row, position, inside = row_of(member)
    first_lane = inside & t.equal(t.lane, 0)

    def of_row(name: str) -> list[Any]:
        """A vector of this warp's row, spread over its lanes."""
        width = t.shape(refs[name])[1]
        return [t.load(refs[name], member, t.lane + first) for first in range(0, width, 32)]

    def write_sketch() -> None:
        words = encoder.bits // 32
        if encoder.magnitude is not None:
            energy = _sum(t, [u * u for u in of_row("component")])
            threshold = t.root(energy / components) * encoder.magnitude
        for first in range(0, words, _PARTS):
            word = part + first
            with t.when(word < words) if first + _PARTS > words else nullcontext():
                # Bit i of a word is bit i % 8 of its byte i // 8: see `packing`.
                field = (t.lane % 8) * (4 * words) + word * 4 + t.lane // 8
                second = field >= components
                u = t.load(refs["component"], member, t.select(second, field - components, field))
                bit = _quantiser_bit(t, refs, u, layer, head, field)
                if encoder.magnitude is not None:
                    large = t.select(t.absolute(u) > threshold, 1, 0)
                    bit = t.select(second, t.select(t.equal(bit, large), 1, 0), bit)
                if "sign" in refs:
                    t.store(refs["sign"], t.to_real(bit * 2 - 1), member, field)
                packed = _reduce(t, bit << t.lane, lambda a, b: a | b)
                with t.when(first_lane):
                    t.store(refs["key_words"], packed, layer, row, head * words + word, position)

    def quantise_value() -> None:
        top = 2**value_bits - 1
        vector = of_row("value")
        lowest, highest = vector[0], vector[0]
        for x in vector[1:]:
            lowest, highest = t.minimum(lowest, x), t.maximum(highest, x)
        lowest, highest = _reduce(t, lowest, t.minimum), _reduce(t, highest, t.maximum)
        zero, scale = t.to_bf16(lowest), t.to_bf16((highest - lowest) / top)
        shift, step = t.from_bf16(zero), t.from_bf16(scale)
        divisor = t.select(step > 0.0, step, 1.0)
        for i, x in enumerate(vector):
            level = t.select(step > 0.0, (x - shift) / divisor, 0.0)
            code = t.minimum(t.maximum(t.round(level), 0.0), float(top))
            t.store(refs["value"], code, member, t.lane + 32 * i)
        with t.when(first_lane):
            t.store(refs["value_affine"], (scale << 16) | zero, layer, row, head, position)

    def write_value_words() -> None:
        row_of_words = head * words_per_column(head_dim, value_bits)
        low = 0
        for bits in _PLANES[value_bits]:
            words = words_per_column(head_dim, bits)
            word = t.select(t.lane < words, t.lane, words - 1)
            packed = t.integer(0)
            for plane in range(8 // bits):
                for byte in range(4):
                    code = t.load(refs["value"], member, word * 4 + (4 * words * plane + byte))
                    digits = (t.to_integer(code) >> low) & (2**bits - 1)
                    packed = packed | (digits << (8 * byte + bits * plane))
            with t.when(inside & (t.lane < words)):
                t.store(refs["value_words"], packed, layer, row, row_of_words + word, position)
            row_of_words, low = row_of_words + words, low + bits

    def write_scale() -> None:
        if "metric" in refs:
            energy = _sum(t, [y * y for y in of_row("true")])
            pairs = zip(of_row("metric_true"), of_row("decoded"), strict=True)
            along = _sum(t, [a * b for a, b in pairs])
        else:
            energy = _sum(t, [x * x for x in of_row("key")])
            components_here = of_row("component")
            lengths = [t.absolute(u) for u in components_here]
            if encoder.magnitude is not None:
                squares = _sum(t, [u * u for u in components_here])
                threshold = t.root(squares / components) * encoder.magnitude
                lengths = [x * t.select(x > threshold, t.real(3.0), 1.0) for x in lengths]
            along = _sum(t, lengths)
        scale = energy / t.select(along > 0.0, along, 1.0)
        scale = t.select(along > 0.0, scale, 0.0)
        if isfinite(encoder.longest):
            scale = t.minimum(scale, encoder.longest)
        half = TOKEN_BLOCK // 2
        offset = position % TOKEN_BLOCK
        column = position // TOKEN_BLOCK * half + offset % half
        with t.when(first_lane):
            pair = head * 2 + offset // half
            t.store(refs["key_scales"], t.to_bf16(scale), layer, row, pair, column)

    read_vectors()
    t.barrier()
    _multiply(t, refs["projection"], layer, head, refs["key"], refs["component"])
    if "metric" in refs:
        _multiply(t, refs["metric"], layer, head, refs["key"], refs["true"])
    t.barrier()
    write_sketch()
    with t.when(t.equal(part, _PARTS - 1)):
        quantise_value()
    t.barrier()
    if "metric" in refs:
        # The metric is symmetric, so true · (metric decoded) = (metric true) · decoded, whose
        # two products do not wait for each other.
        _multiply(t, refs["transform"], layer, head, refs["sign"], refs["decoded"])
        _multiply(t, refs["metric"], layer, head, refs["true"], refs["metric_true"])
        t.barrier()
    with t.when(t.equal(part, _PARTS - 1)):
        write_value_words()
    if "key_scales" in refs:
        with t.when(t.equal(part, 0)):
            write_scale()


def _quantiser_bit(t: Any, refs: Mapping[str, Any], u: Any, layer: Any, head: Any, bit: Any) -> Any:
    """Bit number `bit` of a sketch, 0 or 1, from its component; a second plane's comes later."""
    if "levels" not in refs:
        return t.select(u >= 0.0, 1, 0)
    levels = t.load(refs["levels"], layer, head, bit)
    weight = t.load(refs["weight"], layer, head, bit)
    level = t.minimum(t.maximum(t.floor(u) + levels, 0.0), levels * 2.0 - 1.0)
    return t.to_integer(t.floor(level / weight)) & 1


def _multiply(t: Any, matrix: Any, layer: Any, head: Any, source: Any, target: Any) -> None:
    """`target = matrix · source` for the vectors of all rows; each warp takes eight outputs."""
    outputs, inputs = t.shape(matrix)[2:]
    chunks = range(0, inputs, 32)
    vectors = [[t.load(source, row, t.lane + i) for i in chunks] for row in range(ROWS)]
    for first in range(0, outputs, _OUTPUTS * _WARPS):
        output = t.warp * _OUTPUTS + first
        if first + _OUTPUTS * _WARPS > outputs:
            # Warps without outputs of their own repeat the last ones.
            output = t.select(output < outputs, output, outputs - _OUTPUTS)
        address = t.address(matrix, layer, head, output, t.lane)
        elements = [[t.fetch(address, j * inputs + i) for i in chunks] for j in range(_OUTPUTS)]
        products = []
        for vector in vectors:
            for line in elements:
                total = line[0] * vector[0]
                for a, b in zip(line[1:], vector[1:], strict=True):
                    total = t.fma(a, b, total)
                products.append(total)
        t.store(target, _sum_each(t, products), t.lane // _OUTPUTS, output + t.lane % _OUTPUTS)


def _prefetch(t: Any, matrix: Any, layer: Any, head: Any) -> None:
    """Starts to bring one head's matrix into the L2 cache, a line of 32 floats per thread."""
    outputs, inputs = t.shape(matrix)[2:]
    lines = outputs * inputs // 32
    for first in range(0, lines, _THREADS):
        line = t.thread + first
        line = t.select(line < lines, line, lines - 1)
        address = t.address(matrix, layer, head, line * 32 // inputs, line * 32 % inputs)
        t.prefetch(address, 0)


def _sum_each(t: Any, numbers: list[Any]) -> Any:
    """Sums 32 numbers over all lanes; lane i gets the sum of number i."""
    distance = 16
    while distance:
        upper = (t.lane & distance) > 0
        pairs = list(zip(numbers[:distance], numbers[distance:], strict=True))
        sent = [t.shuffle(t.select(upper, low, high), distance) for low, high in pairs]
        kept = [t.select(upper, high, low) for low, high in pairs]
        numbers = [a + b for a, b in zip(kept, sent, strict=True)]
        distance //= 2
    return numbers[0]


def _sum(t: Any, numbers: list[Any]) -> Any:
    """The sum of all numbers over all lanes, in every lane."""
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return _reduce(t, total, lambda a, b: a + b)


def _reduce(t: Any, x: Any, combine: Any) -> Any:
    for distance in (16, 8, 4, 2, 1):
        x = combine(x, t.shuffle(x, distance))
    return x
