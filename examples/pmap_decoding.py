"""Batch decoding by `jax.pmap`: every device has the whole model and its own rows.

    python examples/pmap_decoding.py MODEL "Once upon a time" "The dog" "One day"

`h1bjax.load(model, mesh="batch=8")` does the same under `jax.jit`, and divides models too; this is
for programs that are built around `pmap`.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32

import h1bjax
from h1bjax.decoder import Decoder


@partial(jax.pmap, static_broadcasted_argnums=3, in_axes=(None, 0, 0, None))
def decode(
    decoder: Decoder,
    prompts: Int32[Array, "rows tokens"],
    lengths: Int32[Array, "rows"],
    new_tokens: int,
) -> Int32[Array, "rows new_tokens"]:
    """Greedily continues one device's prompts, which are padded on the right.

    Args:
        decoder: the same on all devices.
        prompts: token ids.
        lengths: tokens of each prompt; at least one.
        new_tokens: how many to add to each row.
    """
    rows, width = prompts.shape
    index = jnp.arange(width)
    positions = jnp.where(index < lengths[:, None], index, -1)
    empty = decoder.init_cache(batch=rows, max_length=width + new_tokens)
    logits, cache = decoder(prompts, positions, empty)
    last = jnp.take_along_axis(logits, lengths[:, None, None] - 1, axis=1)[:, 0]

    def step(carry: tuple, _: None) -> tuple[tuple, Array]:
        logits, cache = carry
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits, cache = decoder(token[:, None], cache.lengths[:, None], cache)
        return (logits[:, 0], cache), token

    _, tokens = jax.lax.scan(step, (last, cache), None, length=new_tokens)
    return tokens.T


def generate(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Continues prompts of token ids, dealt to all local devices."""
    devices = jax.local_device_count()
    rows = -(-len(prompts) // devices)
    # Rows that fill up the last devices repeat the first prompt.
    padded = prompts + [prompts[0]] * (devices * rows - len(prompts))
    width = max(map(len, padded))
    tokens = jnp.asarray([prompt + [0] * (width - len(prompt)) for prompt in padded], jnp.int32)
    lengths = jnp.asarray([len(prompt) for prompt in padded], jnp.int32)
    found = decode(
        decoder, tokens.reshape(devices, rows, width), lengths.reshape(devices, rows), new_tokens
    )
    return found.reshape(devices * rows, new_tokens)[: len(prompts)].tolist()


def main() -> None:
    """Continues the prompts of the command line."""
    folder, *texts = sys.argv[1:]
    model = h1bjax.load(folder)
    assert model.tokenizer is not None
    prompts = [model.tokenizer.encode(text) for text in texts]
    for prompt, tokens in zip(prompts, generate(model.decoder, prompts, 64), strict=True):
        print(model.tokenizer.decode(prompt + tokens))


if __name__ == "__main__":
    main()
