"""Llama-family decoding in JAX from a compressed key-value cache."""

from h1bjax.cache import PRESETS, CacheSpec, KVCache
from h1bjax.config import LlamaConfig
from h1bjax.decoder import Decoder
from h1bjax.model import Model, load
from h1bjax.output import GenerateOutput, StreamStep

__all__ = [
    "PRESETS",
    "CacheSpec",
    "Decoder",
    "GenerateOutput",
    "KVCache",
    "LlamaConfig",
    "Model",
    "StreamStep",
    "load",
]
