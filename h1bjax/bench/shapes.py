"""Models that can be measured by name, with random weights."""

from types import MappingProxyType

from h1bjax.config import LlamaConfig, RopeConfig

_ROPE = RopeConfig(theta=500_000.0)


def _llama(
    vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, *, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        model_type="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        rope=_ROPE,
        tie_word_embeddings=tied,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_window=None,
        dtype="bfloat16",
        bos_token_id=None,
        eos_token_ids=(),
    )


SHAPES = MappingProxyType(
    {
        "llama-3-8b": _llama(128_256, 4096, 14_336, 32, 32, 8, tied=False),
        "llama-3.2-3b": _llama(128_256, 3072, 8192, 28, 24, 8, tied=True),
        "llama-3.2-1b": _llama(128_256, 2048, 8192, 16, 32, 8, tied=True),
        "llama-2-7b": _llama(32_000, 4096, 11_008, 32, 32, 32, tied=False),
        "tiny": _llama(512, 128, 256, 2, 4, 2, tied=True),
    }
)
"""Widths and depths of models; RoPE's frequencies, which cost the same whatever they are, are not
theirs."""
