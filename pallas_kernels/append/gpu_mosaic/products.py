"""Products of the encoder's matrices and the keys of a block's rows, by tensor cores in float32."""

from collections.abc import Callable, Mapping

from pallas_kernels.append.gpu_mosaic.places import ROWS, WARPS, GlobalArray, Layout, Place
from pallas_kernels.mosaic_gpu import ptx, registers
from pallas_kernels.mosaic_gpu.registers import F32, I32, I64

_TILE = 16
_TEAMS = WARPS // 2
# Registers of a thread for what it has asked for.
_AHEAD = 64
# The upper bits of a float32, as many as tensor cores take.
_SINGLE = -(1 << 13)


def begin_products(
    here: Place, layout: Layout, arrays: Mapping[str, GlobalArray]
) -> Callable[[], None]:
    """Begins to load what this warp multiplies; returns what does the rest of it.

    A warp takes every eighth tile of 16 lines, and half of their channels. Channels are dealt to
    the columns of the operands so that a lane's four of 16 lie side by side in memory.
    """
    head_dim, last = layout.head_dim, layout.lines // _TILE - 1
    half_bytes, steps = 2 * head_dim, range(head_dim // 32)
    warp = here.thread >> 5
    half, team = warp & 1, warp >> 1
    r, c = here.lane >> 2, here.lane & 3

    def line_address(line: I32) -> I64:
        """Where this warp's half of a line of the matrices begins."""
        address = None
        for name, first in layout.matrices.items():
            found = arrays[name].at(here.layer, here.head, line - first, half * (head_dim // 2))
            if address is None:
                address = found
            else:
                address = registers.select(line.less(first), address, found)
        assert address is not None
        return address

    def load(tile: I32) -> list[list[F32]]:
        address = line_address(tile * _TILE + r) + c * 16
        return [
            [x.as_float() for x in ptx.load(address, 64 * step + 32 * head_dim * lower, count=4)]
            for step in steps
            for lower in (0, 1)
        ]

    def multiply(lines: list[list[F32]], tile: I32) -> None:
        vector = here.shared + r * layout.key_row + half * half_bytes + c * 16
        # Large times large, large times small and small times large parts.
        totals = [[registers.F32.constant(0.0)] * 4] * 3
        for step in steps:
            upper, lower = lines[2 * step : 2 * step + 2]
            keys = [x.as_float() for x in ptx.load(vector, 64 * step, count=4)]
            for i in (0, 2):
                a = [upper[i], lower[i], upper[i + 1], lower[i + 1]]
                large_a, small_a = _split(a)
                large_b, small_b = _split(keys[i : i + 2])
                pairs = ((large_a, large_b), (large_a, small_b), (small_a, large_b))
                totals = [
                    ptx.multiply_singles(a, b, total)
                    for (a, b), total in zip(pairs, totals, strict=True)
                ]
        products = [x + (y + z) for x, y, z in zip(*totals, strict=True)]
        target = here.shared + (half * ROWS + c * 2) * layout.product_row + (tile * _TILE + r) * 4
        for i, product in enumerate(products):
            offset = layout.products + i % 2 * layout.product_row + i // 2 * 32
            ptx.store(target, product, offset=offset)

    # Warps without a tile of their own repeat the last.
    tiles = [(team + first).minimum(last) for first in range(0, last + 1, _TEAMS)]
    ahead = max(1, _AHEAD // (8 * len(steps)))
    loaded = [load(tile) for tile in tiles[:ahead]]
    for tile in tiles[ahead:]:
        address = line_address(tile * _TILE + (here.lane & (_TILE - 1)))
        for offset in range(0, half_bytes, 128):
            ptx.prefetch(address, offset)

    def finish() -> None:
        for i, tile in enumerate(tiles):
            multiply(loaded[i], tile)
            if len(loaded) < len(tiles):
                loaded.append(load(tiles[len(loaded)]))

    return finish


def _split(numbers: list[F32]) -> tuple[list[F32], list[F32]]:
    """Numbers as sums of two that tensor cores take with hardly any loss."""
    large = [(x.as_bits() & _SINGLE).as_float() for x in numbers]
    return large, [x - y for x, y in zip(numbers, large, strict=True)]
