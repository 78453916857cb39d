"""Makes the golden folders beside this file: tiny random models, run by transformers in float32.

Each folder holds config.json and model.safetensors as transformers writes them, and golden.npz:

    tokens         int32   [batch, tokens], right-padded with 0
    lengths        int32   [batch], valid tokens per row
    logits         float32 [batch, tokens, vocab]
    layer_outputs  float32 [layers + 1, batch, tokens, hidden]: the embeddings, then the residual
                   stream after each layer, before the final norm

Needs torch and transformers:

    python tests/golden/make_golden.py [--out FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

# Every model is this one but for the keys that its entry names.
COMMON: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama_mha": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "llama_gqa_tied_llama3_rope": {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            # Small, so that all three branches of the frequencies are taken in a few tokens.
            "original_max_position_embeddings": 32,
        },
        "eos_token_id": [2, 5],
    },
    "llama_linear_rope": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 48,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    },
    "llama_biases": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama_mqa": {
        "model_type": "llama",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 80,
    },
    "mistral": {
        "model_type": "mistral",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "sliding_window": 64,
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 96,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}

LENGTHS = (18, 11, 5)


def make_model(overrides: Mapping[str, Any], seed: int) -> Any:
    """A random float32 model, far from the default initialisation so that mistakes show.

    Args:
        overrides: keys of its config.json beside `COMMON`; names the model_type.
        seed: of torch's generator.

    Returns:
        The transformers model in evaluation mode, with eager attention.
    """
    settings = {**COMMON, **overrides}
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(settings)))
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.2 * noise)
    return model.eval()


def random_tokens(vocab_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A ragged batch of token ids.

    Args:
        vocab_size: ids are drawn below it.
        seed: of NumPy's generator.

    Returns:
        tokens int32 [batch, tokens], right-padded with 0, and lengths int32 [batch].
    """
    lengths = np.array(LENGTHS, np.int32)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, (len(lengths), lengths.max()))
    tokens[np.arange(lengths.max()) >= lengths[:, None]] = 0
    return tokens.astype(np.int32), lengths


def run_model(model: Any, tokens: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs a transformers model on a right-padded batch.

    Args:
        model: a causal language model of the Llama family.
        tokens: int32 [batch, tokens].
        lengths: int32 [batch].

    Returns:
        logits float32 [batch, tokens, vocab] and layer outputs float32
        [layers + 1, batch, tokens, hidden]. Values at padding mean nothing.
    """
    outputs: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    # transformers' own hidden_states end with the normed output, so the layers are hooked.
    layers = [model.model.embed_tokens, *model.model.layers]
    hooks = [layer.register_forward_hook(keep) for layer in layers]
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    try:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor(tokens, dtype=torch.int64),
                attention_mask=torch.tensor(mask, dtype=torch.int64),
                use_cache=False,
            ).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits.numpy(), torch.stack(outputs).numpy()


def main() -> None:
    """Writes the folders that the command line asks for."""
    parser = argparse.ArgumentParser(description="Make golden models with transformers.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="parent folder")
    parser.add_argument(
        "--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), help="families"
    )
    arguments = parser.parse_args()
    for seed, (name, overrides) in enumerate(FAMILIES.items()):
        if name not in arguments.only:
            continue
        model = make_model(overrides, seed)
        tokens, lengths = random_tokens(model.config.vocab_size, seed)
        logits, layer_outputs = run_model(model, tokens, lengths)
        folder = arguments.out / name
        model.save_pretrained(folder)
        if "eos_token_id" not in overrides:  # one family keeps it, as an example
            (folder / "generation_config.json").unlink()
        np.savez_compressed(
            folder / "golden.npz",
            tokens=tokens,
            lengths=lengths,
            logits=logits,
            layer_outputs=layer_outputs,
        )
        print(f"{name}: largest logit {np.abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
