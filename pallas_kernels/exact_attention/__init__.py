"""Decode attention over keys and values that are stored as they are."""

from pallas_kernels.exact_attention.api import choose, exact_attention

__all__ = ["choose", "exact_attention"]
