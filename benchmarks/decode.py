r"""Prefill and decoding speed of a randomly initialised Llama, one row per cache preset.

Random weights decode as fast as trained ones, so no download is needed:

    python benchmarks/decode.py --layers 16 --hidden 2048 --heads 32 --kv-heads 8 --mlp 8192 \
        --batch 8 --context 8192 --cache exact --cache h1b

Each preset runs once to compile and once for the clock.
"""

import argparse
import json
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from h1bjax import PRESETS, CacheSpec, Decoder, LlamaConfig, Model
from h1bjax.decoder import init_codec
from h1bjax.parameters import decoder_parameters


def main() -> None:
    """Prints one JSON object per preset."""
    options = _parse()
    config = LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": options.vocab,
            "hidden_size": options.hidden,
            "intermediate_size": options.mlp,
            "num_hidden_layers": options.layers,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads,
            "max_position_embeddings": options.context,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "torch_dtype": options.dtype,
            "bos_token_id": None,
            "eos_token_id": None,
        }
    )
    key = jax.random.key(0)
    parameters = {
        name: _normal(
            jax.random.fold_in(key, index),
            ((config.num_layers,) if info.stacked else ()) + info.shape,
            options.dtype,
        )
        for index, (name, info) in enumerate(decoder_parameters(config).items())
    }
    length = options.context - options.new_tokens
    prompts = np.random.default_rng(0).integers(config.vocab_size, size=(options.batch, length))
    device = jax.devices()[0]
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, **vars(options)}))
    for preset in options.cache:
        spec = CacheSpec.preset(preset)
        model = Model(Decoder(config, parameters, spec, init_codec(config, spec, key)), None)
        for _ in range(2):
            begin = time.perf_counter()
            out = model.generate(prompts.tolist(), max_new_tokens=options.new_tokens)
            total = time.perf_counter() - begin
        print(
            json.dumps(
                {
                    "cache": preset,
                    "cache_nbytes": out.cache.nbytes,
                    "prefill_seconds": round(total - out.decode_seconds, 3),
                    "ms_per_step": round(1e3 * out.decode_seconds / options.new_tokens, 3),
                    "tokens_per_second": round(out.tokens_per_second, 1),
                }
            ),
            flush=True,
        )


def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return (0.02 * jax.random.normal(key, shape)).astype(jnp.dtype(dtype))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name, default in {
        "layers": 4,
        "hidden": 256,
        "heads": 4,
        "kv-heads": 2,
        "mlp": 1024,
        "vocab": 4096,
        "batch": 1,
        "context": 1024,
        "new-tokens": 64,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--cache", action="append", choices=tuple(PRESETS), default=None)
    options = parser.parse_args()
    options.cache = options.cache or ["exact", "h1b"]
    return options


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
