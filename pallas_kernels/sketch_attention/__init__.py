"""Decode attention over packed sketches and value codes."""

from pallas_kernels.choice import Choice, Implementation
from pallas_kernels.sketch_attention.api import sketch_attention
from pallas_kernels.sketch_attention.arguments import (
    BlockRope,
    PackedKeys,
    PackedValues,
    PreparedTransform,
    SketchQuery,
)
from pallas_kernels.sketch_attention.choice import choose, prepare_transform
from pallas_kernels.sketch_attention.partial import Partial, merge, softmax_partial

__all__ = [
    "BlockRope",
    "Choice",
    "Implementation",
    "PackedKeys",
    "PackedValues",
    "Partial",
    "PreparedTransform",
    "SketchQuery",
    "choose",
    "merge",
    "prepare_transform",
    "sketch_attention",
    "softmax_partial",
]
