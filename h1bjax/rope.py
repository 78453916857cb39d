"""RoPE frequencies of a model, as transformers defines them."""

import math

import numpy as np
from jaxtyping import Float

from h1bjax.config import LlamaConfig


def rope_frequencies(config: LlamaConfig) -> Float[np.ndarray, "half_dim"]:
    """Radians per token of each channel pair, float32.

    "linear" divides every frequency by the factor (position interpolation, arXiv 2306.15595).
    "llama3" divides those whose wavelength exceeds the original context over `low_freq_factor`,
    keeps those below it over `high_freq_factor`, and blends between (Llama 3.1,
    arXiv 2407.21783).
    """
    rope, head_dim = config.rope, config.head_dim
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.float32(rope.theta) ** exponent
    if rope.type == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.type == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0).astype(np.float32)
        return keep * frequencies + (1 - keep) * frequencies / np.float32(rope.factor)
    return frequencies
