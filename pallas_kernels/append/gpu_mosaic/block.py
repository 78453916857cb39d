"""What one block of threads does.

A block has one KV head and eight rows of the batch, which are the columns of the tensor cores'
matrix operand: `mma` multiplies 16 lines of the encoder's matrices by all eight keys at once. Half
of its 16 warps take the first half of the channels, half the rest. Afterwards, of the two warps
that a row has, one writes its sketch; the other has meanwhile written its value.
"""

from collections.abc import Mapping

from pallas_kernels.append.arguments import KeyEncoder
from pallas_kernels.append.gpu_mosaic.places import ROWS, WARPS, GlobalArray, Layout, Place
from pallas_kernels.append.gpu_mosaic.products import begin_products
from pallas_kernels.append.gpu_mosaic.sketch import write_sketch
from pallas_kernels.append.gpu_mosaic.value import write_value, write_window
from pallas_kernels.mosaic_gpu import ptx, registers
from pallas_kernels.mosaic_gpu.registers import I32

_THREADS = 32 * WARPS


def append_block(
    thread: I32,
    shared: I32,
    head: I32,
    group: I32,
    arrays: Mapping[str, GlobalArray],
    encoder: KeyEncoder,
    value_bits: int,
    sinks: int,
) -> None:
    """Appends the tokens of one KV head and up to `ROWS` rows.

    Args:
        thread: its number in the block.
        shared: address of `Layout.nbytes` of shared memory.
        head: the KV head.
        group: which `ROWS` rows.
        arrays: operands and arrays of the cache, by name.
        encoder: its arrays are among `arrays`; here its shapes and static attributes count.
        value_bits: width of a value's code.
        sinks: of the window.
    """
    layout = Layout.of(encoder)
    batch, capacity = arrays["keys"].shape[0], arrays["key_words"].shape[-1]
    wanted = group * ROWS + ((thread >> 5) & (ROWS - 1))
    row = wanted.minimum(batch - 1)
    layer = ptx.load(arrays["layer"].address)[0]
    position = ptx.load(arrays["positions"].at(row))[0]
    inside = wanted.less(batch) & position.less(capacity)
    inside = inside & registers.I32.constant(-1).less(position)
    here = Place(thread, shared, head, layer, row, position, inside)

    # What is to be waited for is asked for first.
    lane = here.lane
    key, value = (arrays[name].floats(lane, row, head) for name in ("keys", "values"))
    exact = arrays["exact_keys"].floats(lane, row, head) if "exact_keys" in arrays else key
    mean = arrays["mean"].floats(lane, layer, head)
    finish_products = begin_products(here, layout, arrays)

    def share_key() -> None:
        target = shared + here.member * layout.key_row + lane * 4
        for i, (x, centre) in enumerate(zip(key, mean, strict=True)):
            ptx.store(target, x - centre, offset=128 * i)
        if "window_keys" in arrays:
            write_window(here, arrays["window_keys"], exact, sinks)

    def keep_value() -> None:
        if "window_values" in arrays:
            write_window(here, arrays["window_values"], value, sinks)
        write_value(here, layout, arrays, value, value_bits)

    has_key = thread.less(_THREADS // 2)
    registers.when(has_key, share_key)
    registers.when(registers.I32.constant(_THREADS // 2 - 1).less(thread), keep_value)
    if "levels" in arrays:
        _share_levels(here, layout, arrays)
    ptx.barrier()
    finish_products()
    ptx.barrier()
    registers.when(has_key, lambda: write_sketch(here, layout, arrays, encoder))


def _share_levels(here: Place, layout: Layout, arrays: Mapping[str, GlobalArray]) -> None:
    """Copies the quantiser's levels and weights to shared memory."""
    for name, target in (("levels", layout.levels), ("weight", layout.levels + 4 * layout.bits)):
        for first in range(0, layout.bits, _THREADS):
            bit = here.thread + first
            source = arrays[name].at(here.layer, here.head, bit.minimum(layout.bits - 1))
            number = ptx.load(source)[0]
            place = here.shared + bit * 4
            ptx.store(place, number, offset=target, only=bit.less(layout.bits))
