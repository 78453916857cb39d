"""The compressed key-value cache, the heart of the library."""

from h1bjax.cache.attend import append_and_attend
from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.cache.dense import dense_attention
from h1bjax.cache.keys import (
    CodecParameters,
    GaussianSigns,
    LinearCode,
    OrthogonalSigns,
    TwoPlanes,
)
from h1bjax.cache.kv_cache import KVCache
from h1bjax.cache.prefill import choose_prefill, fill_and_attend
from h1bjax.cache.spec import PRESETS, UNCALIBRATED, CacheSpec, padded_capacity
from h1bjax.cache.training import choose_training, training_attention
from h1bjax.cache.values import QuantisedValues, random_rotation

__all__ = [
    "PRESETS",
    "UNCALIBRATED",
    "CacheSpec",
    "ChannelQuantisedKeys",
    "CodecParameters",
    "GaussianSigns",
    "KVCache",
    "LinearCode",
    "OrthogonalSigns",
    "QuantisedValues",
    "TwoPlanes",
    "append_and_attend",
    "choose_prefill",
    "choose_training",
    "dense_attention",
    "fill_and_attend",
    "padded_capacity",
    "random_rotation",
    "training_attention",
]
