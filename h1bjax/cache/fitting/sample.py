"""What a codec is fitted to."""

from dataclasses import dataclass

import jax
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeySample:
    """Keys of one layer, and which of their directions queries look at. All float32.

    With a finite RoPE period, both are relative to the block of the key.

    Attributes:
        keys: as the codec will see them.
        query_moment: mean of `q qᵀ` over pairs of a query and a key that it reads sketched,
            weighted by how much an error of that pair's logit would change the attention.
    """

    keys: Float[Array, "kv_heads samples head_dim"]
    query_moment: Float[Array, "kv_heads head_dim head_dim"]
