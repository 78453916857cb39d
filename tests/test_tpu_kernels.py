"""The TPU kernels' numbers, by Pallas's interpreter, which also looks for races."""

from dataclasses import replace
from functools import partial
from typing import Any

import float64
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from sketch_cases import CASES, KERNEL_CASES, LONG, TURNED, SketchCase, build
from test_append_kernel import CAPACITY, CODECS, encoder_of, inputs

from pallas_kernels import append, choice
from pallas_kernels.append import append_token, reference
from pallas_kernels.mosaic_tpu import device
from pallas_kernels.sketch_attention import choose, sketch_attention
from pallas_kernels.sketch_attention.choice import implementation_named
from pallas_kernels.sketch_attention.tpu import tuning
from pallas_kernels.sketch_attention.tpu.key_tiles import divide_rows

pytestmark = pytest.mark.once

# Two blocks of 256 tokens, of which the second overhangs; two rows see nothing.
SMALL = replace(
    LONG, groups=2, capacity=384, batch=4, layers=2, layer=1, start=4, stops=(384, 300, 3, -60)
)
TURNED_SMALL = replace(TURNED, capacity=384, stops=(350, 37))
QUICK = {
    "one plane with its scalar, outlier scales": replace(SMALL, outliers=True),
    "256 signs and a signed query": replace(SMALL, bits=256, scalars=False, signed=True),
    "variance of two planes, 3-bit values": replace(
        SMALL, bits=192, head_dim=96, variance=True, planes=2, value_bits=3
    ),
    "nine heads, 2-bit values, no scalars": replace(
        SMALL, groups=9, kv_heads=3, head_dim=64, bits=64, value_bits=2, scalars=False
    ),
    "one KV head of 256 channels, logits far below zero": replace(
        SMALL, kv_heads=1, head_dim=256, bits=256, opposed=True
    ),
    "period 32": TURNED_SMALL,
}
LONGER = {
    "eight KV heads": replace(SMALL, kv_heads=8, groups=1),
    "sixteen KV heads of three words": replace(SMALL, kv_heads=16, groups=1, bits=96),
    "period 128, variance": replace(TURNED_SMALL, period=128, head_dim=64, bits=96, variance=True),
}

APPENDS: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "signs": (CODECS["signs"], 2, {"positions": (-1, 0, 64, 127, 128, CAPACITY - 1, CAPACITY)}),
    "unscaled": (CODECS["unscaled"], 3, {"positions": (0, 255), "window": False, "value_bits": 2}),
    "two planes": (CODECS["two planes"], 1, {"positions": (5, 200), "value_bits": 3}),
    "linear": (
        CODECS["linear"],
        8,
        {"positions": (7, -1), "relative": True, "dtype": jnp.bfloat16},
    ),
}


@pytest.fixture
def interpreted(capfd, monkeypatch):
    """Kernels run in the interpreter, on short blocks; a test fails where it saw a race."""
    monkeypatch.setattr(tuning, "BLOCKS", (256, 256))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()
    # Older releases print what newer ones raise.
    assert "RACE" not in capfd.readouterr().out


def attend(case: SketchCase, implementation="mosaic_tpu"):
    (query, keys, values, layer, start, stop), answer = build(case)
    run = jax.jit(partial(sketch_attention, start=start, implementation=implementation))
    return jax.tree.map(np.asarray, run(query, keys, values, layer, stop=stop)), answer


def assert_near(case: SketchCase) -> None:
    found, answer = attend(case)
    float64.assert_near(found, answer.output, answer.lse, 2e-4, rtol=1e-4, atol=2e-3)


@pytest.mark.usefixtures("interpreted")
class TestAttention:
    @pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)
    def test_it_is_near_float64_over_the_same_codes(self, case):
        assert_near(case)

    @pytest.mark.slow
    @pytest.mark.parametrize("tokens", [256, 384])
    def test_values_without_a_scale_still_weigh(self, tokens):
        case = replace(LONG, kv_heads=1, groups=1, capacity=384, stops=(384,), batch=1)
        (query, keys, values, layer, start, stop), _ = build(case)
        zero_only = values.affine & 0xFFFF
        affine = values.affine.at[..., :tokens].set(zero_only[..., :tokens])
        constant = replace(values, affine=affine)
        found, answer = (
            jax.jit(partial(sketch_attention, start=start, implementation=implementation))(
                query, keys, constant, layer, stop=stop
            )
            for implementation in ("mosaic_tpu", "xla")
        )
        np.testing.assert_allclose(found.output, answer.output, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(found.lse, answer.lse, rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "case", (LONGER | CASES | KERNEL_CASES).values(), ids=list(LONGER | CASES | KERNEL_CASES)
    )
    def test_it_is_near_for_whatever_kernels_are_tested_on(self, monkeypatch, case):
        monkeypatch.setattr(tuning, "BLOCKS", (1024, 1024))
        (query, keys, values, *_), _ = build(case)
        refusal = implementation_named("mosaic_tpu").refusal(query, keys, values)
        if refusal is None:
            assert_near(case)
        else:
            with pytest.raises(ValueError, match="cannot run as 'mosaic_tpu'"):
                attend(case)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    "name",
    [
        "signs",
        "unscaled",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("two planes", "linear")),
    ],
)
def test_the_append_writes_what_the_plain_form_writes_and_nothing_else(name):
    codec, kv_heads, changes = APPENDS[name]
    arguments = inputs(encoder_of(codec, kv_heads=kv_heads)[0], **changes)
    found = jax.jit(partial(append_token, implementation="mosaic_tpu"))(*arguments)
    expected = jax.jit(reference.append_token)(*arguments)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("several queries", "one query per row, not 5"),
        ("3-bit values of 80 channels", "no 3-bit values of 80 channels"),
    ],
)
def test_what_it_cannot_run_is_refused_with_a_reason(name, reason):
    with pytest.raises(ValueError, match=f"cannot run as 'mosaic_tpu': .*{reason}"):
        attend(CASES[name])


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("heads", "words"), [(1, 1), (1, 3), (1, 4), (3, 2), (5, 3), (2, 6), (8, 4), (3, 8), (2, 7)]
)
def test_tiles_hold_every_bit_of_every_head_once(heads, words, apart):
    found = 0
    for tile in divide_rows(heads, words, apart=apart):
        placed = np.stack([tile.placement(head) for head in range(tile.heads)])
        assert placed.shape == (tile.heads, 32 * words, tile.contraction)
        assert (placed.sum(axis=2) == 1).all()
        assert (placed.sum(axis=(0, 1)) <= 1).all()
        found += tile.heads
    assert found == heads


# The choice


def on_tpu(monkeypatch, generation):
    monkeypatch.setattr(choice, "tpu_generation", lambda: generation)


@pytest.mark.parametrize(
    ("case", "generation", "implementation", "reason"),
    [
        (SMALL, 5, "mosaic_tpu", "a TPU v5"),
        (SMALL, 4, "xla", "TPU v4 is older than v5"),
        (replace(SMALL, queries=2), 6, "xla", "it takes one query per row, not 2"),
        (replace(SMALL, kv_heads=3), 6, "xla", "would copy arrays of 3 and 6 and 12 rows"),
    ],
)
def test_the_device_decides(monkeypatch, case, generation, implementation, reason):
    on_tpu(monkeypatch, generation)
    query, keys, values, *_ = build(replace(case, capacity=128, stops=(3,)))[0]
    found = choose(query, keys, values)
    assert found.implementation == implementation
    assert reason in found.reason


def test_the_append_is_chosen_likewise(monkeypatch):
    on_tpu(monkeypatch, 6)
    for kv_heads, implementation in ((2, "mosaic_tpu"), (3, "xla")):
        stored, _, encoder, token = inputs(encoder_of(CODECS["signs"], kv_heads=kv_heads)[0])
        assert append.choose(stored, encoder, token).implementation == implementation


@pytest.mark.parametrize(
    ("kind", "generation"), [("TPU v4", 4), ("TPU v5 lite", 5), ("TPU v6 lite", 6), ("TPU7x", 7)]
)
def test_the_generation_is_read_from_the_kind_of_device(monkeypatch, kind, generation):
    class Device:
        device_kind = kind

    monkeypatch.setattr(device.jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(device.jax, "devices", lambda: [Device()])
    assert device.tpu_generation() == generation
