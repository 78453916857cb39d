"""A key's bits and scalar."""

from collections.abc import Mapping
from math import isfinite

from pallas_kernels.append.arguments import KeyEncoder
from pallas_kernels.append.gpu_mosaic.places import ROWS, GlobalArray, Layout, Place, one_if
from pallas_kernels.mosaic_gpu import ptx, registers
from pallas_kernels.mosaic_gpu.registers import F32, I32
from pallas_kernels.packing import TOKEN_BLOCK

_HALF_BLOCK = TOKEN_BLOCK // 2


def write_sketch(
    here: Place, layout: Layout, arrays: Mapping[str, GlobalArray], encoder: KeyEncoder
) -> None:
    """Makes bits and scalar of a row's products, and writes them."""
    components, words = encoder.projection.shape[-2], layout.bits // 32
    lane, zero = here.lane, registers.F32.constant(0.0)

    def product(name: str, line: I32) -> F32:
        address = here.shared + here.member * layout.product_row + line * 4
        first = layout.products + 4 * layout.matrices[name]
        halves = (ptx.load(address, first + ROWS * layout.product_row * i)[0] for i in (0, 1))
        one, other = (half.as_float() for half in halves)
        return one + other

    def spread(name: str, lines: int) -> list[F32]:
        return [product(name, lane + first) for first in range(0, lines, 32)]

    threshold = None
    if encoder.magnitude is not None:
        energy = _sum([u * u for u in spread("projection", components)])
        threshold = ptx.square_root(energy * (1 / components)) * encoder.magnitude

    read = []
    for word in range(words):
        # Bit i of a word is bit i % 8 of its byte i // 8: see `packing`.
        field = (lane & 7) * (4 * words) + (lane >> 3) + 4 * word
        second = registers.I32.constant(components - 1).less(field)
        u = product("projection", registers.select(second, field - components, field))
        bit = (
            _quantiser_bit(here, layout, u, field)
            if "levels" in arrays
            else one_if(u.at_least(0.0))
        )
        if threshold is not None:
            large = one_if(ptx.absolute(u).greater(threshold))
            bit = registers.select(second, one_if(bit.equals(large)), bit)
        if "reading" in arrays:
            along = product("reading", field)
            read.append(registers.select(bit.equals(1), along, -along))
        packed = ptx.ballot(bit)
        target = arrays["key_words"].at(
            here.layer, here.row, here.head * words + word, here.position
        )
        ptx.store(target, packed, only=here.inside & lane.equals(word % 32))
    if "key_scales" not in arrays:
        return

    if "metric" in arrays:
        vector = spread("metric", layout.head_dim)
    else:
        address = here.shared + here.member * layout.key_row + lane * 4
        vector = [ptx.load(address, 128 * i)[0].as_float() for i in range(layout.head_dim // 32)]
        read = [ptx.absolute(u) for u in spread("projection", components)]
        if threshold is not None:
            read = [registers.select(x.greater(threshold), x * 3.0, x) for x in read]
    energy, along = _sum([x * x for x in vector]), _sum(read)
    positive = along.greater(0.0)
    scale = ptx.divide(energy, registers.select(positive, along, registers.F32.constant(1.0)))
    scale = registers.select(positive, scale, zero)
    if isfinite(encoder.longest):
        scale = ptx.minimum(scale, registers.F32.constant(encoder.longest))
    offset = here.position % TOKEN_BLOCK
    column = here.position // TOKEN_BLOCK * _HALF_BLOCK + offset % _HALF_BLOCK
    pair = here.head * 2 + offset // _HALF_BLOCK
    target = arrays["key_scales"].at(here.layer, here.row, pair, column)
    registers.when(
        here.inside & lane.equals(0), lambda: ptx.store_half(target, ptx.to_bfloat16(scale))
    )


def _quantiser_bit(here: Place, layout: Layout, u: F32, bit: I32) -> I32:
    """Bit number `bit` of a sketch from its component, by the level that this falls into."""
    address = here.shared + bit * 4
    levels, weight = (
        ptx.load(address, layout.levels + offset)[0].as_float() for offset in (0, 4 * layout.bits)
    )
    level = ptx.maximum(ptx.floor(u) + levels, registers.F32.constant(0.0))
    level = ptx.minimum(level, levels * 2.0 - 1.0)
    return ptx.floor(ptx.divide(level, weight)).to_integer() & 1


def _sum(numbers: list[F32]) -> F32:
    """The sum of all numbers over all lanes, in every lane."""
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    for mask in (16, 8, 4, 2, 1):
        total = total + ptx.shuffle_xor(total, mask)
    return total
