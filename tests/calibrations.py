"""Calibrations with random numbers, for tests that need no fitted ones."""

import jax
import jax.numpy as jnp
from flax import nnx
from toy import toy_config

from h1bjax.cache import CodecParameters, random_rotation
from h1bjax.calibrate import Calibration
from h1bjax.calibration_file import CalibrationText
from h1bjax.decoder import init_codec

TEXT = CalibrationText(
    files={"book.txt": "0" * 64}, tokens=64, tokens_sha256="1" * 64, context=32, seed=0
)


def random_calibration(spec, seed=0, config=None):
    """A valid calibration of the toy model, or of `config`'s, that no default equals."""
    config = toy_config() if config is None else config
    codec_key, rotation_key, mean_key = jax.random.split(jax.random.key(1000 + seed), 3)
    codec = init_codec(config, spec, codec_key)
    if codec is not None:
        arrays = {
            name: param[...] for name, param in vars(codec).items() if isinstance(param, nnx.Param)
        }
        arrays["mean"] = 0.1 * jax.random.normal(mean_key, arrays["mean"].shape)
        arrays["temperature"] = jnp.full_like(arrays["temperature"], 0.9)
        codec = CodecParameters(**arrays)
    rotation = None
    if spec.values is not None and spec.values.rotated:
        rotation = random_rotation(
            rotation_key, config.num_layers, config.num_kv_heads, config.head_dim
        )
    return Calibration(spec, codec, rotation)
