"""A decode step of Llama 3 70B, divided over the 16 chips of a TPU slice, compiled without one."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from tpu_ahead import GENERATIONS, assert_in_place, compile_step, mesh_of, stored_bytes

from h1bjax.bench.shapes import SHAPES
from h1bjax.cache import CacheSpec
from pallas_kernels import choice

pytestmark = [pytest.mark.once, pytest.mark.slow]

LLAMA_3_70B = replace(
    SHAPES["llama-3-8b"],
    hidden_size=8192,
    intermediate_size=28_672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
)
ROWS, TOKENS = 16, 32_768
COLLECTIVE = re.compile(
    r"= \S+ (all-gather|all-reduce|reduce-scatter|all-to-all|collective-\w+)\(.*channel_id=(\d+)"
)


@pytest.mark.parametrize(
    ("chip", "preset", "sizes"),
    [
        ("v5e", "h1b", "tensor=8,sequence=2"),
        ("v6e", "h1b", "tensor=8,sequence=2"),
        ("v6e", "h1b-p32-v2", "batch=2,tensor=8"),
        ("v5e", "h1b-signs", "tensor=4,sequence=4"),
    ],
)
def test_a_step_moves_no_weights_and_no_cache(monkeypatch, chip, preset, sizes):
    monkeypatch.setattr(choice, "tpu_generation", lambda: GENERATIONS[chip])
    mesh, spec = mesh_of(chip, sizes, "4x4"), CacheSpec.preset(preset)
    step = compile_step(mesh, LLAMA_3_70B, spec, batch=ROWS, max_length=TOKENS)
    assert_in_place(step.compiled, step.cache, (step.decoder, step.tokens), written=True)

    whole = spec.nbytes(LLAMA_3_70B, batch=ROWS, max_length=TOKENS)
    assert step.cache.window_keys is not None
    windows = 2 * 2 * step.cache.window_keys.size
    # Windows are not divided along sequence; 128 lengths are the fewest that a chip stores.
    per_chip = (whole - windows) / mesh.size + windows * mesh.shape["sequence"] / mesh.size
    assert stored_bytes(step.cache) == per_chip + 4 * 128
    # A collective that overlaps with others is written down in several forms.
    found = Counter(kind for kind, _ in set(COLLECTIVE.findall(step.compiled.as_text() or "")))
    # Three of hidden states; queries, attention, and the best logits with their tokens.
    gathers = 2 + 2 * (mesh.shape["sequence"] > 1)
    assert found == {"all-reduce": 3, "all-gather": gathers}
