"""A value's codes, scale and zero, and vectors that the window keeps."""

from collections.abc import Mapping

from pallas_kernels.append.gpu_mosaic.places import GlobalArray, Layout, Place
from pallas_kernels.mosaic_gpu import ptx, registers
from pallas_kernels.mosaic_gpu.registers import F32
from pallas_kernels.packing import words_per_column

_PLANES = {2: (2,), 3: (2, 1), 4: (4,)}


def write_window(here: Place, window: GlobalArray, vector: list[F32], sinks: int) -> None:
    """Writes a key or a value as bf16 to its slot."""
    ring = window.shape[2] - sinks
    later = (here.position - sinks) % ring + sinks
    slot = registers.select(here.position.less(sinks), here.position, later)
    channel = here.head * (32 * len(vector)) + here.lane

    def write() -> None:
        target = window.at(here.layer, here.row, slot, channel)
        for i, x in enumerate(vector):
            ptx.store_half(target, ptx.to_bfloat16(x), offset=64 * i)

    registers.when(here.inside, write)


def write_value(
    here: Place,
    layout: Layout,
    arrays: Mapping[str, GlobalArray],
    vector: list[F32],
    value_bits: int,
) -> None:
    """Quantises a value as `pallas_kernels.affine` does, and writes it."""
    top = 2**value_bits - 1
    lowest, highest = vector[0], vector[0]
    for x in vector[1:]:
        lowest, highest = ptx.minimum(lowest, x), ptx.maximum(highest, x)
    for mask in (16, 8, 4, 2, 1):
        lowest = ptx.minimum(lowest, ptx.shuffle_xor(lowest, mask))
        highest = ptx.maximum(highest, ptx.shuffle_xor(highest, mask))
    zero, scale = ptx.to_bfloat16(lowest), ptx.to_bfloat16((highest - lowest) * (1 / top))
    shift, step = (zero << 16).as_float(), (scale << 16).as_float()
    some = step.greater(0.0)
    divisor = registers.select(some, step, registers.F32.constant(1.0))
    codes = here.shared + here.member * (4 * layout.head_dim)
    for i, x in enumerate(vector):
        code = ptx.nearest(ptx.divide(x - shift, divisor)).to_integer()
        code = registers.select(some, code.maximum(0).minimum(top), registers.I32.constant(0))
        ptx.store(codes + here.lane * 4, code, offset=layout.codes + 128 * i)
    ptx.warp_barrier()

    first_row = here.head * words_per_column(layout.head_dim, value_bits)
    low = 0
    for bits in _PLANES[value_bits]:
        words = words_per_column(layout.head_dim, bits)
        word = here.lane.minimum(words - 1)
        packed = registers.I32.constant(0)
        for plane in range(8 // bits):
            fields = ptx.load(codes + word * 16, layout.codes + 16 * words * plane, count=4)
            for byte, code in enumerate(fields):
                digits = (code >> low) & (2**bits - 1)
                packed = packed | (digits << (8 * byte + bits * plane))
        target = arrays["value_words"].at(here.layer, here.row, first_row + word, here.position)
        ptx.store(target, packed, only=here.inside & here.lane.less(words))
        first_row, low = first_row + words, low + bits
    target = arrays["value_affine"].at(here.layer, here.row, here.head, here.position)
    registers.when(
        here.inside & here.lane.equals(0), lambda: ptx.store(target, (scale << 16) | zero)
    )
