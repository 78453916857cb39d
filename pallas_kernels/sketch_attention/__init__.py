"""Decode attention over packed sketches and value codes."""

from pallas_kernels.sketch_attention.api import sketch_attention
from pallas_kernels.sketch_attention.arguments import (
    BlockRope,
    PackedKeys,
    PackedValues,
    SketchQuery,
)
from pallas_kernels.sketch_attention.choice import Choice, Implementation, choose
from pallas_kernels.sketch_attention.partial import Partial, merge, softmax_partial

__all__ = [
    "BlockRope",
    "Choice",
    "Implementation",
    "PackedKeys",
    "PackedValues",
    "Partial",
    "SketchQuery",
    "choose",
    "merge",
    "sketch_attention",
    "softmax_partial",
]
