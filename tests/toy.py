"""Small random models in Hugging Face folders, with tokenizers that have every awkward feature."""

import functools
import json
import string
import warnings

import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

import h1bjax
from h1bjax.checkpoint import save_pretrained
from h1bjax.config import LlamaConfig
from h1bjax.parameters import decoder_parameters

SPECIAL = ["<unk>", "<s>", "</s>"]
EOS = 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def byte_level():
    """Every byte is a token, after the special ones; nothing is put in front of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*SPECIAL, *alphabet, "th", "the"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return tokenizer


def sentencepiece(bos=True):
    """As Llama 2's: a space and a BOS are put in front, and unknown characters become bytes."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_lowercase]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the")]
    pieces += ["".join(merge) for merge in merges]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    return tokenizer


def toy_config(**keys):
    return LlamaConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "eos_token_id": EOS,
            "tie_word_embeddings": False,
            "dtype": "float32",
            **keys,
        }
    )


def toy_parameters(config):
    """Weights large enough that what comes next depends on all that came before."""
    generator = np.random.default_rng(0)

    def draw(name, info):
        shape = (config.num_layers, *info.shape) if info.stacked else info.shape
        if name.endswith("norm"):
            return jnp.asarray(1 + 0.1 * generator.standard_normal(shape), jnp.float32)
        fan_in = config.num_heads * config.head_dim if name == "output" else info.shape[0]
        scale = 0.3 if name == "embedding" else 2.0 / np.sqrt(fan_in)
        return jnp.asarray(scale * generator.standard_normal(shape), jnp.float32)

    return {name: draw(name, info) for name, info in decoder_parameters(config).items()}


def readable(parameters):
    """Makes the printable ASCII characters of `byte_level` far more probable than the rest."""
    likely = np.arange(len(SPECIAL), len(SPECIAL) + ord("~") - ord(" "))
    scale = np.full(parameters["unembedding"].shape[1], 0.1, np.float32)
    scale[likely] = 1.0
    return {**parameters, "unembedding": parameters["unembedding"] * scale}


def write_toy(folder, tokenizer=None, change=dict, **keys):
    """A whole model folder; `change` maps the weights to others."""
    config = toy_config(**keys)
    save_pretrained(folder, config, change(toy_parameters(config)))
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        named = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
        (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    return folder


@functools.cache
def load_quietly(folder, cache="exact", dtype=None):
    """Loads once per process, without the warning that a cache is not calibrated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not calibrated")
        return h1bjax.load(folder, cache=cache, dtype=dtype)
