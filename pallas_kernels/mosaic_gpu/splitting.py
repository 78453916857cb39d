"""Into how many parts the tokens of a row are divided."""

import jax

PROCESSORS = 132
"""Multiprocessors of an H100, assumed where there is no GPU to ask."""
MOST_SPLITS = 128


def processors() -> int:
    """Multiprocessors of the default device."""
    return getattr(jax.devices()[0], "core_count", PROCESSORS)


def choose_splits(rows: int, *, slots: int, tiles: float, overhead: float) -> int:
    """The number of splits that should finish first, the smallest of equals.

    Blocks of threads run in waves. Each takes its share of a row's tiles, and a start and an end
    that cost as much as some more tiles.

    Args:
        rows: independent rows, each of which is split.
        slots: blocks of threads that the device runs at once.
        tiles: of a row, divided by the warps of a block.
        overhead: cost of a block's start and end, in tiles of a warp.
    """

    def time(splits: int) -> float:
        return -(-rows * splits // slots) * (tiles / splits + overhead)

    return min(range(1, max(1, min(MOST_SPLITS, int(tiles))) + 1), key=time)
