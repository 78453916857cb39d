"""Decoding on two GPUs gives what one gives."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from calibrations import random_calibration
from toy import toy_config, toy_parameters

from h1bjax.cache import CacheSpec
from h1bjax.compile import jit_decoding
from h1bjax.decoder import Decoder, fold_value_rotation
from h1bjax.generate import prefill
from h1bjax.parameters import decoder_parameters
from h1bjax.sharding import make_mesh, padded_rows, parameter_sharding, place_by_heads, to_host
from pallas_kernels.sketch_attention import api, choose

pytestmark = pytest.mark.gpu

# Heads that the kernels take; two KV heads for tensor=2.
CONFIG = toy_config(
    hidden_size=256, intermediate_size=512, num_key_value_heads=2, head_dim=128,
    max_position_embeddings=4096,
)  # fmt: skip
PROMPTS = [
    np.random.default_rng(row).integers(3, CONFIG.vocab_size, length).tolist()
    for row, length in enumerate((700, 5, 130, 64))
]
STEPS = 48
MOST_FLIPS = 0.03
"""Of all tokens, those that may differ; none does on CPUs, where kernels play no part."""
TIE = 0.03
"""Of the logits' deviation, how far two tokens may lie apart of which either may be chosen."""


def decoder(preset, mesh):
    """A random model with random calibration; float32."""
    spec = CacheSpec.preset(preset)
    calibration = random_calibration(spec, config=CONFIG)
    parameters, rotation = toy_parameters(CONFIG), calibration.rotation
    if mesh is not None:
        rule = parameter_sharding(mesh, CONFIG)
        for name, info in decoder_parameters(CONFIG).items():
            axes = (None, *info.axes) if info.stacked else info.axes
            parameters[name] = jax.device_put(parameters[name], rule(axes))
    if rotation is not None:
        parameters = fold_value_rotation(CONFIG, parameters, place_by_heads(mesh, rotation))
    return Decoder(CONFIG, parameters, spec, calibration.codec, mesh)


@jit_decoding(donate_argnames="cache")
def step(decoder, tokens, cache):
    logits, cache = decoder(tokens[:, None], cache.lengths[:, None], cache)
    return logits[:, 0], cache


def decoded(preset, mesh=None, follow=None):
    """Logits `[steps, rows, vocab]` before each greedy step, or where other tokens are followed."""
    # Products in TF32 would differ by far more than their order of summation makes them.
    with jax.default_matmul_precision("highest"):
        ours = decoder(preset, mesh)
        state = ours.init_cache(batch=padded_rows(mesh, len(PROMPTS)), max_length=1024)
        logits, state = prefill(ours, PROMPTS, state)
        found = [to_host(logits)]
        for index in range(STEPS):
            tokens = np.argmax(found[-1], axis=-1) if follow is None else follow[index]
            logits, state = step(ours, jnp.asarray(tokens, jnp.int32), state)
            found.append(to_host(logits))
    return np.stack(found)


@cache
def alone(preset):
    return decoded(preset)


def check(preset, sizes, devices):
    """Each of the tokens that one device chooses is what a mesh chooses after the same ones.

    So a mesh generates the same text. What may differ is a choice between tokens that tie: another
    order of summation turns the sign of a projection that is almost zero, or a value's code, and
    that one bit moves the logits.
    """
    expected = alone(preset)
    tokens = np.argmax(expected, axis=-1)
    assert len(np.unique(tokens)) > STEPS, "the toy model repeats itself"
    found = decoded(preset, make_mesh(sizes, devices), tokens)
    assert np.isfinite(found).all()
    chosen = np.argmax(found, axis=-1)
    flips = np.argwhere(chosen != tokens)
    margins = [expected[*at, tokens[*at]] - expected[*at, chosen[*at]] for at in flips]
    deviation = expected.std()
    moved = np.abs(found - expected).max() / deviation
    report = (
        f"{preset}, {sizes}: {len(flips)} of {tokens.size} tokens differ, at (step, row) "
        f"{flips.tolist()} by {[f'{margin / deviation:.1e}' for margin in margins]} of the "
        f"logits' deviation; the most that a logit moved is {moved:.1e}, half of them "
        f"{np.median(np.abs(found - expected)) / deviation:.1e}"
    )
    print(report)
    assert len(flips) <= MOST_FLIPS * tokens.size, report
    assert max(margins, default=0) <= TIE * deviation, report


@pytest.fixture
def two_gpus():
    devices = jax.devices()
    if devices[0].platform != "gpu" or len(devices) < 2:
        pytest.skip("there are no two GPUs")
    return devices[:2]


@pytest.mark.parametrize("sizes", ["tensor=2", "sequence=2", "batch=2"])
@pytest.mark.parametrize(
    "preset", ["exact", "h1b", "h1b-paper", "h1b-p32", "h1b-256-v2", "h1b-2plane"]
)
def test_two_gpus_choose_the_tokens_of_one(preset, sizes, two_gpus, monkeypatch):
    ran = set()

    def choosing(*arguments):
        choice = choose(*arguments)
        ran.add((arguments[0].vectors.shape[1], choice.implementation))
        return choice

    monkeypatch.setattr(api, "choose", choosing)
    check(preset, sizes, two_gpus)
    if preset != "exact" and two_gpus[0].compute_capability.startswith("9"):
        assert (1, "mosaic_gpu") in ran, "no decode step ran the kernel"
