"""A decoder small enough for any test, with random weights."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from h1bjax.config import LlamaConfig, RopeConfig
from h1bjax.parameters import decoder_parameters


def small_config(**changes) -> LlamaConfig:
    """A Llama of two layers; `changes` replace any of its fields."""
    config = LlamaConfig(
        model_type="llama",
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        dtype="float32",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    return replace(config, **changes)


def random_parameters(config: LlamaConfig, seed: int = 0) -> dict[str, jnp.ndarray]:
    """What `decoder_parameters` lists, scaled so that activations keep their size."""
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, info in decoder_parameters(config).items():
        shape = (config.num_layers, *info.shape) if info.stacked else info.shape
        size = 1.0 if name.endswith("norm") else config.hidden_size**-0.5
        array = 1.0 + 0.1 * rng.normal(size=shape) if size == 1.0 else size * rng.normal(size=shape)
        parameters[name] = jnp.asarray(array, jnp.float32)
    return parameters
