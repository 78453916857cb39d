"""Queries as operands that meet the sign bits of keys.

A masked bit of a half word is a power of two in float16, so sign bits are operands as they are.
The query's coefficients `Aᵀq` are the other operand: float16, divided by what their bit stands for.
What the tensor cores sum is the coefficients of the bits that are set; with the sum of all of them
that gives the sum over signs, `2·set - all`.

Bits are moved to positions 8 to 13, which stand for 2⁻¹⁶ and more: tensor cores align products as
if subnormal numbers were as large as 2⁻¹⁴, so that smaller ones lose precision.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, loop, select
from pallas_kernels.mosaic_gpu.softmax import LOG2_E
from pallas_kernels.sketch_attention.arguments import PreparedTransform
from pallas_kernels.sketch_attention.gpu_mosaic.plan import COLUMNS, Plan, bit_steps, halved

_SPREAD = 0x00010001
# What bit m of a byte is worth as an operand, in units of 2⁻¹⁶: 2 to this power. Bits 0…5 lie at
# positions 8…13, of which 10 and more belong to the exponent; bits 6 and 7 at positions 10 and 11.
_WORTH = (0, 1, 2, 3, 5, 9, 2, 3)
_WORTH_NIBBLES = sum(worth << 4 * m for m, worth in enumerate(_WORTH))
_UNIT = 16
# Coefficients are at most 2¹⁴, far from the largest float16 even before they are divided.
_LARGEST = 14
_FLOAT16_BIAS = 15


def prepare_transform(
    transform: Float[Array, "layers kv_heads head_dim bits"],
) -> PreparedTransform:
    """Brings transforms into the order and precision in which the kernel reads them."""
    transform = transform.astype(jnp.float32)
    column_norm = jnp.sqrt(jnp.max(jnp.sum(jnp.square(transform), axis=-2), axis=-1))
    # A power of two keeps the codes of the fragments as exact as float16 allows.
    norm = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(column_norm, 1e-30))))
    halves = (transform / norm[..., None, None]).astype(jnp.float16)
    channel, bit = _places(*transform.shape[-2:])
    # Bits beyond the last word count for nothing.
    padded = jnp.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, 1)])
    low, high = (
        jax.lax.bitcast_convert_type(padded[..., channel[..., half], bit], jnp.uint16)
        for half in range(2)
    )
    fragments = low.astype(jnp.int32) | (high.astype(jnp.int32) << 16)
    return PreparedTransform(fragments, norm)


def _places(head_dim: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Channels `[reads, steps, slices, 32, 4, 2]` of fragments, and their bits without the last."""
    words, steps = bits // 32, bit_steps(bits)
    read, m, part, lane, register = np.meshgrid(
        np.arange(-(-words // 4)),
        np.arange(steps),
        np.arange(head_dim // 16),
        np.arange(32),
        np.arange(4),
        indexing="ij",
    )
    second, upper_rows = np.divmod(register, 2)
    row, column = np.divmod(lane, 4)
    channel = 16 * part + 2 * column + 8 * upper_rows
    # Column `2c + e` of an operand becomes row `2c + e` of the next; c takes word c of its four.
    word = 4 * read + row // 2
    byte = 2 * (row % 2) + second
    if halved(bits):
        word, upper_bits = word % 2, word // 2
        m = m + steps * upper_bits
    field = 4 * words * m + 4 * word + byte
    return np.stack([channel, channel + 1], axis=-1), np.where(word < words, field, bits)


@dataclass(frozen=True)
class Columns:
    """What turns a sum over set bits into a logit, for the two columns of a lane.

    The logit, in units of log 2, is `scalar · (sum · factor - base) + bias`.
    """

    factor: list[F32]
    base: list[F32]
    bias: list[F32]


@dataclass(frozen=True)
class QueryReader:
    """Computes the coefficients of a KV head's queries, and hands them to lanes.

    Attributes:
        plan: of the call.
        row: the lane's row.
        column: the lane's column.
        warp: number of the warp.
        shared: address of shared memory.
        queries: address of the KV head's first query.
        fragments: address of the KV head's transform.
        scale: address of the KV head's first scale; None where all heads have the same.
        norm: of the transform.
    """

    plan: Plan
    row: I32
    column: I32
    warp: I32
    shared: I32
    queries: I64
    fragments: I64
    scale: I64 | None
    norm: F32

    @property
    def lane(self) -> I32:
        """Number of the lane."""
        return self.row * 4 + self.column

    def head_of(self, column: I32) -> I32:
        """The head of a column, and of the row of an operand that becomes this column."""
        return column & (self.plan.stride - 1)

    def operand(self, region: I32, read: int) -> list[list[I32]]:
        """Coefficients of eight columns for one read of words: two registers for each m.

        Args:
            region: address of the operand, see `region`.
            read: which four words of a sketch.
        """
        registers: list[I32] = []
        for pair in range(self.plan.bit_steps // 2):
            offset = (4 * read + pair) * 512
            registers += ptx.load(region + self.lane * 16, offset, count=4)
        return [registers[2 * m : 2 * m + 2] for m in range(self.plan.bit_steps)]

    def region(self, index: I32 | int, number: int = 0) -> I32:
        """Address of the operands of a set; `index` is the warp's where each has its own."""
        plan = self.plan
        base = self.shared + plan.shared.coefficients
        per_set = plan.key_reads * 2048
        if isinstance(index, int):
            return base + (index * plan.coefficient_bytes + number * per_set)
        return base + index * plan.coefficient_bytes + number * per_set

    def sum_set_bits(self, words: list[list[I32]], operand: list[list[list[I32]]]) -> list[F32]:
        """Sums of the coefficients of set bits, times 2⁻¹⁶, for 16 tokens and 8 columns.

        Args:
            words: for each read, the words of the tokens at rows r and r + 8.
            operand: for each read, what `operand` gave.
        """
        total = [F32.constant(0.0)] * 4
        for (first, second), coefficients in zip(words, operand, strict=True):
            # Even bytes, then odd ones, in the upper bytes of both halves.
            bytes_of = [first << 8, second << 8, first, second]
            lowered = [first << 4, second << 4, first >> 4, second >> 4]
            for m, registers in enumerate(coefficients):
                source, position = (bytes_of, 8 + m) if m < 6 else (lowered, 4 + m)
                bits = [word & (_SPREAD << position) for word in source]
                total = ptx.multiply_halves(bits, registers, total)
        return total

    def load_scales(self, number: int) -> list[F32]:
        """Scales of the lane's two columns; arbitrary where a column has no head.

        Args:
            number: which operand of a tile.
        """
        if self.scale is None:
            assert self.plan.scale is not None
            return [F32.constant(self.plan.scale)] * 2
        heads = [
            (self.head_of(self.column * 2 + e) + number * COLUMNS).minimum(self.plan.groups - 1)
            for e in range(2)
        ]
        return [ptx.load(self.scale + head.wide() * 4)[0].as_float() for head in heads]

    def factor(self, restore: F32, scales: list[F32]) -> list[F32]:
        """`Columns.factor` of the lane's two columns.

        Args:
            restore: undoes the normalisation of the query at the lane's row.
            scales: what `load_scales` gave.
        """
        constant = LOG2_E * 2.0 ** (1 + _UNIT - _LARGEST)
        return [
            scale * ptx.shuffle(restore, (self.column * 2 + e) * 4) * self.norm * constant
            for e, scale in enumerate(scales)
        ]

    def load_normalised(self, head: I32, present_below: int) -> tuple[list[F32], F32]:
        """A query divided by a power of two that is at least its norm, and that power.

        Args:
            head: which head of the KV head; all zero if it is not below `present_below`.
            present_below: number of heads.

        Returns:
            The lane's channels, `16·slice + 2c + {0, 1, 8, 9}` of every slice, and the power.
        """
        present = head.less(present_below)
        place = self.queries + select(present, head, I32.constant(0)).wide() * (
            4 * self.plan.head_dim
        )
        place = place + self.column * 8
        channels: list[F32] = []
        for part in range(self.plan.slices):
            for offset in (0, 32):
                words = ptx.load(place, 64 * part + offset, count=2)
                channels += [select(present, word.as_float(), F32.constant(0.0)) for word in words]
        energy = F32.constant(0.0)
        for channel in channels:
            energy = ptx.fma(channel, channel, energy)
        energy = _sum_over_columns(energy)
        # ‖q‖² < 2^(e - 126) for the biased exponent e, so ‖q‖ ≤ 2^(half - 63).
        half = ((energy.as_bits() >> 23) + 1) >> 1
        divisor = ((I32.constant(190) - half) << 23).as_float()
        restore = ((half + 64) << 23).as_float()
        return [channel * divisor for channel in channels], restore

    def transform(
        self,
        rows: list[list[I32]],
        first: I32,
        step: int,
        region: I32,
        fragments: I64 | I32,
        loaded: list[I32] | None = None,
    ) -> None:
        """Multiplies queries with the transform, and stores the coefficients as operands.

        Args:
            rows: operand of 16 queries, for every slice of channels.
            first: the first of the products that this warp computes.
            step: distance to the next one.
            region: where to.
            fragments: address of the transform, in global or shared memory.
            loaded: what `load_fragments` gave for the first product; then those of the next are
                loaded ahead, as is good for global memory. None loads each when it is needed,
                which takes fewer registers.
        """
        plan = self.plan
        lane_bytes = self.lane * 16

        def multiply(item: I32, carry: list) -> list:
            ahead = self.load_fragments(item + step, fragments) if carry else []
            place = fragments + (item * (512 * plan.slices) + lane_bytes)
            products = [[F32.constant(0.0)] * 4 for _ in range(2)]
            for part in range(plan.slices):
                words = carry[4 * part : 4 * part + 4] or ptx.load(place, 512 * part, count=4)
                for second in range(2):
                    operand = words[2 * second : 2 * second + 2]
                    products[second] = ptx.multiply_halves(rows[part], operand, products[second])
            worth = (I32.constant(_WORTH_NIBBLES) >> ((item & 7) * 4)) & 15
            shrink = ((I32.constant(_FLOAT16_BIAS + _LARGEST) - worth) << 10) * _SPREAD
            # Product `8·read + m` gives half of what a lane reads at once.
            place_in = region + ((item >> 1) * 512 + (item & 1) * 8 + lane_bytes)
            for number in range(plan.sets):
                # They are at most 1: float16 rounds them as well before the power of two as after.
                halves = [
                    ptx.scale_halves(ptx.pack_halves(*product[2 * number : 2 * number + 2]), shrink)
                    for product in products
                ]
                ptx.store(place_in, *halves, offset=number * plan.key_reads * 2048)
            return ahead

        loop(first, I32.constant(plan.products), step, loaded or [], multiply)

    def load_fragments(self, item: I32, fragments: I64 | I32) -> list[I32]:
        """What a lane needs of the transform for one product: four words for every slice.

        Beyond the last product it reads the last one again.
        """
        item = item.minimum(self.plan.products - 1)
        place = fragments + (item * (512 * self.plan.slices) + self.lane * 16)
        words = []
        for part in range(self.plan.slices):
            words += ptx.load(place, 512 * part, count=4)
        return words

    def sum_all(self, region: I32) -> list[F32]:
        """`sum_set_bits` where all bits are set, for the lane's two columns."""
        ones = [[I32.constant(-1), I32.constant(-1)]] * self.plan.key_reads
        operand = [self.operand(region, read) for read in range(self.plan.key_reads)]
        return self.sum_set_bits(ones, operand)[:2]


def _sum_over_columns(x: F32) -> F32:
    """The sum over the four lanes of a row."""
    for mask in (1, 2):
        x = x + ptx.shuffle_xor(x, mask)
    return x
