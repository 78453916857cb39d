"""Random weights to train from."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

from h1bjax.config import LlamaConfig
from h1bjax.parameters import decoder_parameters

DEVIATION = 0.02


def random_parameters(config: LlamaConfig, key: Key[Array, ""]) -> dict[str, Float32[Array, "..."]]:
    """Parameters of an untrained decoder, as GPT-2 draws them.

    Matrices are normal with a standard deviation of 0.02. Those that write into the residual
    stream, two in each layer, have it divided by `√(2·layers)`, so that its size does not depend
    on the depth. Norm weights are 1, biases 0.

    Args:
        config: the model's.
        key: a PRNG key.

    Returns:
        What `decoder_parameters(config)` lists, stacked.
    """
    table = decoder_parameters(config)

    def draw(name: str, key: Key[Array, ""]) -> Float32[Array, "..."]:
        info = table[name]
        shape = (config.num_layers, *info.shape) if info.stacked else info.shape
        if name.endswith("norm"):
            return jnp.ones(shape, jnp.float32)
        if name.endswith("bias"):
            return jnp.zeros(shape, jnp.float32)
        residual = name in ("output", "down")
        deviation = DEVIATION / (2 * config.num_layers) ** 0.5 if residual else DEVIATION
        return deviation * jax.random.normal(key, shape, jnp.float32)

    keys = jax.random.split(key, len(table))
    return {name: draw(name, key) for name, key in zip(table, keys, strict=True)}
