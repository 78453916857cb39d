"""What a decode step needs of a key codec beyond one layer's parameters, prepared once."""

from dataclasses import dataclass
from typing import Self

import jax

from h1bjax.cache.keys import CodecParameters
from h1bjax.cache.spec import CacheSpec
from pallas_kernels.append import KeyEncoder
from pallas_kernels.sketch_attention import PreparedTransform, prepare_transform


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PreparedCodec:
    """A key codec as kernels read it: of all layers, so that no layer need be cut out.

    Attributes:
        encoder: sketches keys.
        transform: of queries; None where the device has no use for it.
    """

    encoder: KeyEncoder
    transform: PreparedTransform | None

    @classmethod
    def of(cls, spec: CacheSpec, parameters: CodecParameters | None) -> Self | None:
        """That of a decoder whose codec has these parameters; None for a spec without sketches."""
        if spec.sketch is None or parameters is None:
            return None
        transform = None
        if not spec.sketch.signed_query:
            transform = prepare_transform(spec.sketch.query_transform(parameters))
        return cls(spec.sketch.encoder(parameters), transform)
