"""Which arrays a kernel can read where they lie."""

from collections.abc import Iterable

from jaxtyping import Array

_PLAIN_ROWS = (1, 2, 4)
_REGISTER_ROWS = 8


def relayout(arrays: Iterable[Array | None]) -> str | None:
    """Why XLA would copy arrays `[layers, batch, rows, columns]` for a kernel; None if it does not.

    Kernels read rows in order. XLA keeps an argument of a program so only if its rows fill
    registers, or are few enough for a smaller tile; otherwise it puts another axis in their place,
    and copies the whole array before a kernel reads it. Seen of v5e and v6e, with JAX's default
    layouts; a program whose arguments have their layouts pinned does not copy.
    """
    rows = {array.shape[2] for array in arrays if array is not None}
    other = sorted(n for n in rows if n not in _PLAIN_ROWS and n % _REGISTER_ROWS)
    if not other:
        return None
    counts = " and ".join(str(count) for count in other)
    return f"XLA would copy arrays of {counts} rows, which are not 1, 2, 4 or a multiple of 8"
