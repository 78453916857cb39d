"""Llama-family decoding in JAX from a compressed key-value cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h1bjax.cache import PRESETS, CacheSpec, KVCache
    from h1bjax.config import LlamaConfig
    from h1bjax.decoder import Decoder
    from h1bjax.evaluate import Perplexity, perplexity
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
    "Perplexity",
    "StreamStep",
    "load",
    "perplexity",
]

_HOMES = {
    "PRESETS": "cache",
    "CacheSpec": "cache",
    "Decoder": "decoder",
    "GenerateOutput": "output",
    "KVCache": "cache",
    "LlamaConfig": "config",
    "Model": "model",
    "Perplexity": "evaluate",
    "StreamStep": "output",
    "load": "model",
    "perplexity": "evaluate",
}


def __getattr__(name: str) -> Any:
    # Importing JAX takes seconds; the command line's help and mistakes must not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
