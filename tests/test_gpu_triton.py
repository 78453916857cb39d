import re
import sys
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sketch_cases import SketchCase, build

from pallas_kernels import sketch_attention
from pallas_kernels.sketch_attention import gpu_triton

pytestmark = pytest.mark.once

AMPERE, ADA = 80, 89
LEAST_SHARED_BYTES = 99 * 1024
"""Shared memory that a program may have on every GPU since Ampere."""

VARIANTS = {
    "one plane with its scalar": SketchCase(head_dim=128, bits=128, groups=4),
    "variance of one plane": SketchCase(variance=True, start=4),
    "variance of two planes of 96 channels": SketchCase(
        head_dim=96, bits=192, groups=3, variance=True, planes=2
    ),
    "no scalars, 96 bits": SketchCase(head_dim=96, bits=96, groups=1, scalars=False),
    "as published: a signed query": SketchCase(
        head_dim=128, bits=256, groups=8, scalars=False, signed=True
    ),
    "sixteen query heads, 3-bit values": SketchCase(groups=16, value_bits=3),
    "256 channels, 2-bit values": SketchCase(head_dim=256, bits=256, value_bits=2),
    "period 32": SketchCase(period=32, dtype="bfloat16"),
    "period 64, a signed query": SketchCase(period=64, scalars=False, signed=True),
}


def arguments(case: SketchCase):
    query, keys, values, _, start, _ = build(replace(case, stops=(1,)))[0]
    return query, keys, values, start


@pytest.fixture(scope="module")
def compiled():
    """Compiles every kernel of a case without a GPU, and gives its PTX."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from pallas_kernels.sketch_attention import gpu_triton_kernels

    @cache
    def compile_case(case: SketchCase, capability: int) -> dict[str, str]:
        query, keys, values, start = arguments(case)
        launches = gpu_triton.plan(query, keys, values, start=start, multiprocessors=108)
        ptx = {}
        for launch in launches:
            kernel = getattr(gpu_triton_kernels, launch.kernel)
            arrays = [name for name in kernel.arg_names if name not in launch.constants]
            assert all(name.isupper() for name in launch.constants)
            assert all(name.islower() for name in arrays)
            source = triton.compiler.ASTSource(
                kernel,
                signature=dict.fromkeys(launch.constants, "constexpr")
                | {name: _pointer(name, case) for name in arrays},
                constexprs={
                    (kernel.arg_names.index(name),): value
                    for name, value in launch.constants.items()
                },
                attrs={
                    (kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in arrays
                },
            )
            options = {"num_warps": launch.warps, "num_stages": launch.stages}
            target = GPUTarget("cuda", capability, 32)
            binary = triton.compile(source, target=target, options=options)
            assert binary.asm["cubin"]
            assert binary.metadata.shared <= LEAST_SHARED_BYTES
            ptx[launch.kernel] = binary.asm["ptx"]
        return ptx

    return compile_case


def _pointer(name: str, case: SketchCase) -> str:
    integers = {"key_words", "value_words", "value_affine", "layer", "stop"}
    if name in integers or (name == "coefficients" and case.signed):
        return "*i32"
    if name == "key_scales":
        return "*u16" if case.scalars else "*i32"
    if name == "coefficients":
        return "*fp16"
    return "*bf16" if name == "vectors" and case.dtype == "bfloat16" else "*fp32"


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS)
def test_every_kernel_compiles_for_ampere(compiled, case):
    ptx = compiled(case, AMPERE)
    assert all(".target sm_80" in text for text in ptx.values())


@pytest.mark.parametrize("name", ["one plane with its scalar", "as published: a signed query"])
def test_every_kernel_compiles_for_ada(compiled, name):
    ptx = compiled(VARIANTS[name], ADA)
    assert all(".target sm_89" in text for text in ptx.values())


def test_a_signed_query_attends_by_popcount_and_another_by_tensor_cores(compiled):
    signed = compiled(VARIANTS["as published: a signed query"], AMPERE)["attend"]
    other = compiled(VARIANTS["one plane with its scalar"], AMPERE)["attend"]
    assert re.search(r"\bpopc\.b32\b", signed)
    assert "popc" not in other
    assert "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32" in other


def test_it_lowers_for_cuda_where_there_is_no_gpu(monkeypatch):
    # It says that it needs a JAX for GPUs by an ImportError of its own.
    jax_triton = pytest.importorskip("jax_triton", exc_type=ImportError)
    launcher = jax_triton.triton_lib.triton_kernel_call_lib
    monkeypatch.setattr(launcher, "get_compute_capability", lambda device: AMPERE)
    (query, keys, values, layer, start, stop), _ = build(VARIANTS["variance of one plane"])

    @jax.jit
    def attend(query, keys, values, layer, stop):
        return gpu_triton.sketch_attention(query, keys, values, layer, start=start, stop=stop)

    traced = attend.trace(query, keys, values, layer, stop)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == 3


@pytest.mark.parametrize("multiprocessors", [1, 108, 132])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_split_to_fill_the_device(multiprocessors, batch):
    query, keys, values, start = arguments(SketchCase(batch=batch, groups=4))
    keys = replace(keys, words=jax.ShapeDtypeStruct((1, batch, 4, 65536), jnp.int32))
    launch = gpu_triton.plan(
        query, keys, values, start=start, multiprocessors=multiprocessors
    ).attend
    tiles = gpu_triton.TILES[False, 8, False]
    room = multiprocessors * tiles.residents
    programs = int(np.prod(launch.grid))
    assert programs <= room
    most = 65536 // (tiles.tokens * gpu_triton.MIN_TILES_PER_SPLIT)
    assert launch.grid[0] == most or programs + 2 * batch > room


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (SketchCase(queries=2), "one query per row, got 2"),
        (SketchCase(head_dim=80), "a head dimension of 64, 96, 128 or 256, got 80"),
        (SketchCase(bits=32), "sketches of 64, 96, 128, 192 or 256 bits, got 32"),
        (SketchCase(groups=17), "at most 16 query heads per KV head, got 17"),
        (SketchCase(period=16), "a RoPE period of at least 32, got 16"),
    ],
)
def test_what_it_cannot_run_it_says(case, reason):
    query, keys, values, _ = arguments(case)
    assert gpu_triton.refusal(query, keys, values) == f"it takes {reason}"


def test_all_reasons_are_given_together():
    query, keys, values, _ = arguments(SketchCase(queries=2, head_dim=80, bits=32))
    refusal = gpu_triton.refusal(query, keys, values)
    assert refusal is not None
    assert len(refusal.split("; ")) == 3


@pytest.mark.parametrize("package", ["jax_triton", "triton"])
def test_a_missing_package_is_named_with_its_remedy(monkeypatch, package):
    monkeypatch.delitem(
        sys.modules, "pallas_kernels.sketch_attention.gpu_triton_kernels", raising=False
    )
    monkeypatch.delattr(sketch_attention, "gpu_triton_kernels", raising=False)
    for name in ("jax_triton", "triton"):
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    query, keys, values, _ = arguments(SketchCase())
    with pytest.raises(ImportError, match=rf'{package}.*pip install "h1bjax\[triton\]"'):
        gpu_triton.refusal(query, keys, values)
