"""The benches: what they count, what they print, and that their own answers are right."""

import json
import re
import subprocess
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from h1bjax import cli
from h1bjax.bench import contents, decode, placement, prefill, worker
from h1bjax.bench.case import Case, Measured
from h1bjax.bench.shapes import SHAPES
from h1bjax.cache import PRESETS as CACHE_PRESETS
from h1bjax.cache import CacheSpec
from h1bjax.cache.sharded import init_sharded
from h1bjax.decoder import Decoder, init_codec
from h1bjax.parameters import decoder_parameters
from h1bjax.sharding import parameter_sharding
from pallas_kernels.sketch_attention import bench, bench_cases, sketch_attention, timing
from pallas_kernels.sketch_attention.bench_cases import PRESETS, Shape
from pallas_kernels.sketch_attention.timing import Seconds

pytestmark = pytest.mark.once

TOY = Shape(2, 2, 2, 256, 32)


# the kernel's bench


@pytest.mark.parametrize("name", PRESETS)
def test_kernel_presets_are_the_cache_presets_of_that_name(name):
    preset, spec = PRESETS[name], CACHE_PRESETS[name]
    keys, values = spec.sketch, spec.values
    assert keys is not None
    assert values is not None
    for head_dim in (64, 96, 128, 256):
        assert preset.sketch_bits(head_dim) == keys.sketch_bits(head_dim)
        assert preset.bytes_per_token(head_dim) == spec.bytes_per_token(head_dim)
    assert preset.scaled == keys.scaled
    assert preset.signed == keys.signed_query
    assert preset.period == spec.rope_period
    assert preset.value_bits == values.bits
    assert (preset.code == "planes") == (keys.planes == 2)
    assert preset.variance == (spec.scores == "corrected")


def test_kernel_presets_are_all_that_the_kernel_runs():
    sketched = {name for name, spec in CACHE_PRESETS.items() if spec.sketch is not None}
    assert set(PRESETS) == sketched


@pytest.mark.parametrize("name", PRESETS)
def test_random_inputs_hold_the_bytes_that_are_counted(name):
    inputs = _inputs(name, layers=2)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves((inputs.keys, inputs.values)))
    tokens = TOY.batch * TOY.kv_heads * TOY.tokens
    assert stored == 2 * tokens * PRESETS[name].bytes_per_token(TOY.head_dim)


@pytest.mark.parametrize("name", ["h1b", "h1b-v3", "h1b-p32", "h1b-signs", "h1b-2plane-v2"])
def test_reference_agrees_with_the_float64_answer(name):
    inputs = _inputs(name, layers=2, stop=np.asarray([131, 256], np.int32))
    attend = jax.jit(partial(sketch_attention, start=0, implementation="xla"))
    for call, row, head in ((0, 0, 0), (1, 1, 3)):
        partial_softmax = attend(
            inputs.queries[call],
            inputs.keys,
            inputs.values,
            inputs.layers[call],
            stop=inputs.stop,
        )
        output = partial_softmax.output[row, 0, head]
        expected = bench_cases.exact_answer(inputs, call, row, head)
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_random_logits_are_spread_as_those_of_a_model():
    inputs = _inputs("h1b", layers=1, calls=8)
    attend = jax.jit(partial(sketch_attention, start=0))
    lse = [
        attend(query, inputs.keys, inputs.values, inputs.layers[0], stop=inputs.stop).lse
        for query in inputs.queries
    ]
    # Of Gaussian logits with deviation 2, the mean of exp is e².
    assert np.mean(lse) - np.log(TOY.tokens) == pytest.approx(2, abs=0.7)


def test_ragged_rows_see_half_of_the_tokens_or_more():
    shape = Shape(64, 1, 1, 1024)
    lengths = bench_cases.stops(shape, ragged=True, seed=0)
    assert lengths.min() >= 512
    assert lengths.max() <= 1024
    assert len(set(lengths.tolist())) > 32
    assert (bench_cases.stops(shape, ragged=False, seed=0) == 1024).all()


def test_shapes_have_names_or_numbers():
    assert Shape.parse("batch") == Shape(8, 8, 4, 32768, 128)
    assert Shape.parse("1,2,3,256") == Shape(1, 2, 3, 256, 128)
    assert Shape.parse("1,2,3,256,64") == Shape(1, 2, 3, 256, 64)
    for text in ("tall", "1,2,3", "1,2,3,0", "1,2,3,200", "1,2,3,256,40"):
        with pytest.raises(ValueError, match=f"shape '{text}'"):
            Shape.parse(text)


def test_calls_rotate_over_two_caches_at_least():
    assert bench._rotation(10**12) == 2


def test_the_table_has_a_line_for_the_peer_and_for_each_preset(capsys, short_chains):
    _run("--preset", "h1b-v2", "--ragged")
    out = capsys.readouterr().out
    head, *rows = [line for line in out.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[1] for line in rows[1:]] == ["bf16", "h1b-v2"]
    assert all(line.count("|") == head.count("|") for line in rows)
    assert "GB/s" in out.splitlines()[0]


def test_json_has_what_the_table_shows(capsys, short_chains):
    _run("--preset", "h1b", "--json")
    device, peer, row = map(json.loads, capsys.readouterr().out.splitlines())
    assert device["versions"]["jax"] == jax.__version__
    assert device["copy_bytes_per_second"] > 0
    assert peer["preset"] == "bf16"
    assert peer["nbytes"] == 2 * 2 * 256 * 4 * 32
    assert row["shape"] == list(TOY)
    assert row["implementation"] == "xla"
    assert row["nbytes"] == 2 * 2 * 256 * PRESETS["h1b"].bytes_per_token(32)
    assert row["error"] < 1e-5
    assert row["seconds"]["kernels"] is None


def test_figures_follow_from_the_median():
    row = bench.Row((1, 1, 1, 128, 128), False, "h1b", "xla", "", nbytes=1000)
    timed = row.timed(Seconds(2e-6, 1e-6, 3e-6, None), 1e9, Seconds(6e-6, 6e-6, 6e-6, None))
    assert timed.bandwidth == pytest.approx(5e8)
    assert timed.share == pytest.approx(0.5)
    assert timed.speedup == pytest.approx(3)


def test_what_cannot_run_is_a_line_with_the_reason(capsys, monkeypatch):
    def refuse(*arguments):
        raise ValueError("no such device")

    monkeypatch.setattr(bench, "choose", refuse)
    _run("--preset", "h1b", "--no-peer", "--implementation", "mosaic_gpu")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("| 2,2,2,256,32 | h1b | mosaic_gpu | ValueError: no such device |")


def test_a_bad_shape_ends_the_bench_before_it_begins():
    with pytest.raises(SystemExit, match="error: shape 'tall'"):
        bench.main(["--shape", "tall"])


def _inputs(name, *, layers, calls=2, stop=None):
    stop = bench_cases.stops(TOY, ragged=False, seed=0) if stop is None else stop
    return bench_cases.random_inputs(
        jax.random.key(0), stop, shape=TOY, preset=PRESETS[name], layers=layers, calls=calls
    )


@pytest.fixture
def short_chains(monkeypatch):
    """Chains of two calls, which compile sooner."""
    for module in (timing, bench):
        monkeypatch.setattr(module, "CALLS", 2)
    monkeypatch.setattr(timing, "ROUNDS", (1, 2))


def _run(*arguments):
    shape = ",".join(map(str, TOY))
    short = ("--repetitions", "2", "--copy-bytes", "4096")
    bench.main(["--shape", shape, *short, *arguments])


# whole decode steps

TINY = SHAPES["tiny"]
CASE = Case(TINY, "h1b", batch=2, context=200, repetitions=2, steps=3, dtype="float32")


def test_shapes_have_the_sizes_of_the_models_they_are_named_after():
    def parameters(name):
        drawn = jax.eval_shape(
            lambda rng: contents.random_parameters(SHAPES[name], jnp.bfloat16, rng),
            jax.random.key(0),
        )
        return sum(array.size for array in drawn.values())

    assert parameters("llama-3-8b") == 8_030_261_248
    assert parameters("llama-3.2-3b") == 3_212_749_824
    assert parameters("llama-3.2-1b") == 1_235_814_400
    assert parameters("llama-2-7b") == 6_738_415_616


@pytest.mark.parametrize("preset", ["exact", "h1b-signs", "kivi-2"])
def test_a_random_cache_has_every_byte_of_a_real_one(preset):
    cache = _random_cache(preset)
    spec = CacheSpec.preset(preset)
    empty = decode.KVCache.init(TINY, spec, batch=2, max_length=200, dtype=jnp.float32)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), cache) == jax.tree.map(
        lambda x: (x.shape, x.dtype), empty
    )
    assert cache.nbytes == spec.nbytes(TINY, batch=2, max_length=200, dtype="float32")
    for leaf in jax.tree.leaves(replace(cache, lengths=None)):
        assert len(np.unique(leaf[0, 0])) > 1, "a row without contents"
        assert not np.array_equal(leaf[0, 0], leaf[1, 1]), "rows that are alike"


def test_decode_steps_are_greedy_decoding_from_the_cache():
    spec = CacheSpec.preset("h1b-signs")
    rng = jax.random.key(3)
    parameters = contents.random_parameters(TINY, jnp.float32, rng)
    decoder = Decoder(TINY, parameters, spec, init_codec(TINY, spec, rng))
    cache = replace(_random_cache("h1b-signs"), lengths=jnp.asarray([150, 90]))
    tokens, expected = jnp.asarray([5, 6]), cache
    for _ in range(3):
        logits, expected = decoder(tokens[:, None], expected.lengths[:, None], expected)
        tokens = jnp.argmax(logits[:, 0], axis=-1)
    got, cache, finite = decode.decode_steps(decoder, jnp.asarray([5, 6]), cache, steps=3)
    assert finite
    np.testing.assert_array_equal(got, tokens)
    np.testing.assert_array_equal(cache.lengths, [153, 93])
    np.testing.assert_array_equal(cache.key_words, expected.key_words)


def test_measuring_counts_the_cache_the_weights_and_the_tokens():
    found = decode.measure(CASE)
    spec = CacheSpec.preset("h1b")
    assert found.name == "h1b"
    assert found.cache_nbytes == spec.nbytes(TINY, batch=2, max_length=200, dtype="float32")
    assert found.weights_nbytes == 4 * (512 * 128 + 128 + 2 * (3 * 128 * 256 + 48 * 1024 + 256))
    assert found.tokens_per_second == pytest.approx(2 / found.seconds)
    assert 0 < found.fastest <= found.seconds <= found.slowest
    assert found.versions["jax"] == jax.__version__


def test_the_largest_batch_is_the_last_that_fits(monkeypatch):
    limit = 3_000_000
    monkeypatch.setattr(decode, "device_memory", lambda mesh: {"bytes_limit": limit})
    monkeypatch.setattr(decode, "_USABLE", 1.0)
    case = replace(CASE, batch=None)
    parameters = contents.random_parameters(TINY, jnp.float32, jax.random.key(0))
    decoder = Decoder(TINY, parameters)
    batch = decode._largest_batch(decoder, case)
    assert decode._planned(decode._compile(decoder, case, batch)) <= limit
    assert decode._planned(decode._compile(decoder, case, batch + 2)) > limit
    monkeypatch.setattr(decode, "device_memory", lambda mesh: {"bytes_limit": 1_500_000})
    with pytest.raises(ValueError, match="one sequence of 200 tokens"):
        decode._largest_batch(decoder, case)


def test_no_largest_batch_where_the_device_tells_no_memory(monkeypatch):
    monkeypatch.setattr(decode, "device_memory", lambda mesh: {})
    decoder = Decoder(TINY, contents.random_parameters(TINY, jnp.float32, jax.random.key(0)))
    with pytest.raises(ValueError, match="does not tell its memory"):
        decode._largest_batch(decoder, CASE)


@pytest.mark.slow
def test_bench_decode_measures_in_processes_of_its_own(capfd):
    code, lines = _bench(capfd, "decode", "--steps", "2", "--cache", "exact", "--json")
    settings, found = map(json.loads, lines)
    assert code == 0
    assert settings["settings"]["context"] == 200
    assert found["name"] == "exact"
    assert found["batch"] == 1
    assert found["cache_nbytes"] == 2 * 2 * 2 * 256 * 32 * 4
    assert found["tokens_per_second"] > 0


def test_bench_decode_prints_a_table_of_all_caches_and_the_peer(capfd, monkeypatch):
    asked = []

    def run(kind, case):
        asked.append((kind, case.preset, case.batch))
        if case.preset == "h1b-v2":
            return "RuntimeError: RESOURCE_EXHAUSTED"
        return _measured(case.preset, case.batch or 9, 0.01 if case.preset == "exact" else 0.004)

    monkeypatch.setattr(worker, "run", run)
    code, lines = _bench(
        capfd, "decode", "--batch", "4", "--largest-batch", "--cache", "exact", "h1b", "h1b-v2",
        "--peer", "transformers",
    )  # fmt: skip
    assert code == 0
    caches = [("decode", preset) for preset in ("exact", "h1b", "h1b-v2")]
    assert asked == [
        *((*cache, 4) for cache in caches),
        ("transformers", "transformers", 4),
        *((*cache, None) for cache in caches),
    ]
    rows = [line for line in lines if line.startswith("| ")]
    assert rows[3] == "| h1b | 4 | 4.00 (4.00 to 4.00) | 1000 | 2.50 | 1.00 kB | 2.00 kB |"
    assert rows[4] == "| h1b-v2 | 4 | RuntimeError: RESOURCE_EXHAUSTED |  |  |  |  |"
    assert rows[7].startswith("| h1b | 9 (largest) | 4.00")
    assert len({row.count("|") for row in rows}) == 1
    assert lines[-1] == "a device; jax 1.2.3"


def test_bench_prefill_reads_prompts_through_the_cache_and_exactly(capfd, monkeypatch):
    asked = []

    def run(kind, case):
        asked.append((kind, case.preset, case.exact_prefill))
        return _measured(case.preset, case.batch, 0.5)

    monkeypatch.setattr(worker, "run", run)
    code, lines = _bench(capfd, "prefill", "--batch", "3")
    assert code == 0
    assert asked == [
        ("prefill", "exact", False),
        ("prefill", "h1b", False),
        ("prefill", "h1b", True),
    ]
    rows = [line for line in lines if line.startswith("| ")]
    assert "ms for all prompts" in rows[0]
    assert rows[4].startswith("| h1b, exact prefill | 3 | 500.00 (500.00 to 500.00) | 6 | 1.00 |")


def test_measuring_prefill_fills_the_cache():
    found = prefill.measure(replace(CASE, preset="h1b-signs", context=40, steps=0, repetitions=1))
    spec = CacheSpec.preset("h1b-signs")
    assert found.cache_nbytes == spec.nbytes(TINY, batch=2, max_length=40, dtype="float32")
    assert found.tokens_per_second == pytest.approx(80 / found.seconds)


def test_cases_survive_the_way_to_another_process():
    case = replace(CASE, batch=None, exact_prefill=True, mesh="tensor=2")
    assert Case.from_json(json.loads(json.dumps(case.to_json()))) == case
    found = _measured("h1b", 2, 0.1)
    assert Measured.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cache", "h1c"], "unknown cache preset 'h1c'"),
        (["--steps", "200"], "--steps 200 must be fewer than --context 200"),
        (["--shape", "huge"], "unknown shape 'huge'; choose one of llama-3-8b"),
        (["--mesh", "none", "tensor"], "a mesh is written like batch=2,tensor=4"),
        (["--mesh", "model=2"], "a mesh has the axes batch, tensor, sequence, not model"),
        (["--mesh", "tensor=4"], "tensor=4 does not divide the model's 2 KV heads; use tensor=2"),
        (["--mesh", "batch=2", "--batch", "4", "3"], "3 sequences cannot be divided over batch=2"),
        (
            ["--mesh", "tensor=2", "--peer", "transformers"],
            "--peer runs on one device; add none to --mesh",
        ),
    ],
)
def test_bench_decode_refuses_before_it_measures(capfd, monkeypatch, arguments, message):
    monkeypatch.setattr(worker, "run", lambda kind, case: pytest.fail("it measured"))
    # The first process to ask for devices takes their memory.
    monkeypatch.setattr(jax, "devices", lambda: pytest.fail("it took devices"))
    code = cli.main(["bench", "decode", "--shape", "tiny", "--context", "200", *arguments])
    assert code == 2
    assert re.match(f"h1bjax: error: {re.escape(message)}", capfd.readouterr().err)


# decode steps on a mesh


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [
        pytest.param("exact", "batch=2,tensor=2", marks=pytest.mark.slow),
        ("h1b-p32", "sequence=2"),
        pytest.param("exact", "sequence=2", marks=pytest.mark.slow),
        pytest.param("h1b-p32", "batch=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_what_is_drawn_lies_where_the_decoder_has_it(preset, sizes):
    mesh, spec = placement.mesh_of(sizes), CacheSpec.preset(preset)
    parameters = contents.random_parameters(TINY, jnp.float32, jax.random.key(0), mesh)
    rule = parameter_sharding(mesh, TINY)
    for name, info in decoder_parameters(TINY).items():
        axes = (None, *info.axes) if info.stacked else info.axes
        assert parameters[name].sharding.is_equivalent_to(rule(axes), len(axes))
    drawn = _random_cache(preset, mesh)
    size: dict[str, Any] = {"batch": 2, "max_length": 200, "dtype": jnp.float32}
    wanted = init_sharded(mesh, TINY, spec, **size)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), drawn) == jax.tree.map(
        lambda x: (x.shape, x.dtype), wanted
    )
    for array, empty in zip(*map(jax.tree.leaves, (drawn, wanted)), strict=True):
        assert array.sharding.is_equivalent_to(empty.sharding, array.ndim)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(wanted))
    assert placement.nbytes_per_device(drawn) == held


def test_devices_draw_for_themselves_and_alike_what_they_hold_alike():
    place = NamedSharding(placement.mesh_of("batch=2,sequence=2"), PartitionSpec(None, "batch"))
    arguments = (contents._scales, (10, 20, 100, 64), 2, place)
    drawn = contents._drawn(jax.random.key(0), *arguments)
    parts: dict[int | None, list[np.ndarray]] = {}
    for shard in drawn.addressable_shards:
        parts.setdefault(shard.index[1].start, []).append(np.asarray(shard.data))
    (first, first_again), (second, second_again) = parts.values()
    np.testing.assert_array_equal(first, first_again)
    np.testing.assert_array_equal(second, second_again)
    assert not np.array_equal(first, second)
    compiled = contents._drawn.lower(jax.random.key(0), *arguments).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.output_size_in_bytes == drawn.nbytes // 2
    assert memory.temp_size_in_bytes < drawn.nbytes // 10
    assert not re.findall(r"(?:all|collective)-\w+\(", compiled.as_text() or "")


@pytest.mark.parametrize(
    "sizes", [pytest.param("batch=2,tensor=2", marks=pytest.mark.slow), "sequence=2"]
)
def test_measuring_on_a_mesh_counts_all_of_its_devices(sizes):
    found = decode.measure(replace(CASE, mesh=sizes))
    tokens = 256  # a multiple of 128 on each of two devices
    spec = CacheSpec.preset("h1b")
    assert found.mesh == sizes
    assert found.cache_nbytes == spec.nbytes(TINY, batch=2, max_length=tokens, dtype="float32")
    assert found.weights_nbytes == 4 * (512 * 128 + 128 + 2 * (3 * 128 * 256 + 48 * 1024 + 256))
    assert found.tokens_per_second == pytest.approx(2 / found.seconds)


def test_a_loop_on_a_mesh_decodes_what_one_device_decodes_and_leaves_things_where_they_were():
    mesh, rng = placement.mesh_of("batch=2,tensor=2"), jax.random.key(3)
    whole = contents.random_parameters(TINY, jnp.float32, rng)
    rule = parameter_sharding(mesh, TINY)
    divided = {
        name: jax.device_put(whole[name], rule((None, *info.axes) if info.stacked else info.axes))
        for name, info in decoder_parameters(TINY).items()
    }
    found = []
    for decoder in (Decoder(TINY, whole), Decoder(TINY, divided, mesh=mesh)):
        places = placement.shardings(decode._cache_shapes(decoder, CASE, 2))
        cache = _random_cache("exact")
        if decoder.mesh is not None:
            cache = jax.device_put(cache, places)
        tokens = jax.device_put(jnp.asarray([5, 6], jnp.int32), places.lengths)
        compiled = decode._compile(decoder, CASE, 2)
        for _ in range(2):
            lengths = jnp.full(2, 150, jnp.int32, device=places.lengths)
            tokens, cache, finite = compiled(decoder, tokens, replace(cache, lengths=lengths))
            assert finite
        found.append((np.asarray(tokens), np.asarray(cache.keys)))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_allclose(found[0][1], found[1][1], atol=1e-4)


def test_the_largest_batch_of_a_mesh_fills_each_device(monkeypatch):
    limit = 1_500_000
    monkeypatch.setattr(decode, "device_memory", lambda mesh: {"bytes_limit": limit})
    monkeypatch.setattr(decode, "_USABLE", 1.0)
    mesh = placement.mesh_of("batch=2,tensor=2")
    parameters = contents.random_parameters(TINY, jnp.float32, jax.random.key(0), mesh)
    decoder = Decoder(TINY, parameters, mesh=mesh)
    case = replace(CASE, batch=None)
    batch = decode._largest_batch(decoder, case)
    assert batch % 2 == 0
    assert decode._planned(decode._compile(decoder, case, batch)) <= limit
    assert decode._planned(decode._compile(decoder, case, batch + 4)) > limit


def test_more_devices_than_there_are_are_refused():
    outcome = worker._outcome("decode", replace(CASE, mesh="batch=2,sequence=8").to_json())
    assert outcome["error"] == (
        "ValueError: the mesh batch=2,sequence=8 needs 16 devices, and there are 8"
    )


def test_bench_decode_compares_meshes_with_one_device(capfd, monkeypatch):
    asked = []

    def run(kind, case):
        asked.append((kind, case.mesh, case.batch))
        if case.mesh == "sequence=2":
            return "RuntimeError: RESOURCE_EXHAUSTED"
        seconds = 0.01 if case.preset == "exact" else 0.004
        batch = case.batch or (9 if case.mesh is None else 20)
        return _measured(case.preset, batch, seconds if case.mesh is None else seconds / 1.6)

    monkeypatch.setattr(worker, "run", run)
    code, lines = _bench(
        capfd, "decode", "--batch", "4", "--largest-batch", "--peer", "transformers",
        "--mesh", "tensor=2", "none", "sequence=2",
    )  # fmt: skip
    assert code == 0
    caches = [("decode", mesh, 4) for mesh in (None, "tensor=2", "sequence=2") for _ in range(2)]
    caches.insert(2, ("transformers", None, 4))
    assert asked[:7] == caches
    assert {kind for kind, _, _ in asked[7:]} == {"decode"}
    rows = [line for line in lines if line.startswith("| ")]
    assert len({row.count("|") for row in rows}) == 1
    assert "| × exact | × 1 device | cache bytes of all devices | peak memory of one" in rows[0]
    assert rows[3].startswith("| h1b | none | 4 | 4.00 (4.00 to 4.00) | 1000 | 2.50 | 1.00 |")
    assert rows[4].startswith("| transformers | none | 4 |")
    assert rows[6].startswith("| h1b | tensor=2 | 4 | 2.50 (2.50 to 2.50) | 1600 | 2.50 | 1.60 |")
    assert rows[8].startswith("| h1b | sequence=2 | 4 | RuntimeError: RESOURCE_EXHAUSTED |")
    # Other batches have nothing to be compared with.
    assert rows[12].startswith("| h1b | tensor=2 | 20 (largest) | 2.50 (2.50 to 2.50) | 8000 |")
    assert "| 2.50 |  | 1.00 kB" in rows[12]


def test_what_another_case_may_be_spared_is_no_end_of_the_bench():
    config = replace(TINY, model_type="mistral", sliding_window=64, head_dim=32)
    outcome = worker._outcome("decode", replace(CASE, config=config).to_json())
    assert re.match("ValueError: .*sliding window of 64", outcome["error"])


def test_a_worker_that_dies_is_an_error(monkeypatch):
    died = subprocess.CompletedProcess([], -9, stdout="", stderr="first\nlast words\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: died)
    with pytest.raises(RuntimeError, match="measuring 'h1b' ended with -9: last words"):
        worker.run("decode", CASE)


@pytest.mark.slow
def test_the_peer_decodes_from_a_static_cache():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = worker.run("transformers", replace(CASE, preset="transformers"))
    assert isinstance(found, Measured), found
    assert found.cache_nbytes == 2 * 2 * 2 * 2 * 200 * 32 * 4
    assert found.weights_nbytes == 4 * (512 * 128 + 128 + 2 * (3 * 128 * 256 + 48 * 1024 + 256))
    assert found.tokens_per_second > 0


def _random_cache(preset, mesh=None):
    return contents.random_cache(
        TINY,
        CacheSpec.preset(preset),
        batch=2,
        max_length=200,
        dtype=jnp.float32,
        rng=jax.random.key(1),
        mesh=mesh,
    )


def _measured(name, batch, seconds):
    return Measured.from_runs(
        [seconds] * 3,
        tokens=batch,
        name=name,
        batch=batch,
        device="a device",
        versions={"jax": "1.2.3"},
        cache_nbytes=1000,
        weights_nbytes=500,
        peak_nbytes=2000,
        device_nbytes=None,
        compile_seconds=1.0,
    )


def _bench(capfd, *arguments):
    short = ("--context", "200", "--repetitions", "1", "--dtype", "float32")
    code = cli.main(["bench", *arguments, "--shape", "tiny", *short])
    return code, capfd.readouterr().out.splitlines()
