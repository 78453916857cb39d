import dataclasses

import jax
import jax.numpy as jnp
import pytest
from sketch_cases import HEAD_DIMS
from small_model import small_config

from h1bjax.cache import (
    PRESETS,
    CacheSpec,
    ChannelQuantisedKeys,
    GaussianSigns,
    KVCache,
    LinearCode,
    OrthogonalSigns,
    QuantisedValues,
    TwoPlanes,
    padded_capacity,
)

pytestmark = pytest.mark.once


CUSTOM = [
    CacheSpec("keys alone", OrthogonalSigns(), window=7),
    CacheSpec("values alone", values=QuantisedValues(3), sinks=1, window=5),
    CacheSpec("linear", LinearCode(1.5), QuantisedValues(2), rope_period=32, scores="fitted"),
    CacheSpec("quantised keys", ChannelQuantisedKeys(4), sinks=2, window=32),
]


# Presets


def test_the_presets_are_those_documented():
    assert set(PRESETS) == {
        "exact",
        "h1b-paper",
        "h1b",
        "h1b-v3",
        "h1b-v2",
        "h1b-p32",
        "h1b-p32-v2",
        "h1b-256-v2",
        "h1b-64-p32-v2",
        "h1b-unscaled",
        "h1b-unscaled-p32",
        "h1b-signs",
        "h1b-signs-v3",
        "h1b-signs-v2",
        "h1b-2plane",
        "h1b-2plane-v2",
        "kivi-2",
        "kivi-4",
        "sinks-window",
    }
    assert all(spec.name == name == CacheSpec.preset(name).name for name, spec in PRESETS.items())


def test_the_published_scheme_has_no_window_and_no_scalar():
    paper = CacheSpec.preset("h1b-paper")
    assert paper.keys == GaussianSigns(256)
    assert (paper.exact_tokens, paper.scores, paper.rope_period) == (0, "fitted", None)


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("h1b")][1:])
def test_our_presets_keep_64_tokens_exactly_and_repair_what_their_codec_leaves(name):
    spec = CacheSpec.preset(name)
    assert (spec.sinks, spec.window) == (4, 60)
    assert spec.sketch is not None
    assert spec.values is not None
    if not isinstance(spec.keys, LinearCode):
        assert spec.scores == "corrected"
    else:
        assert spec.scores == ("raw" if spec.sketch.scaled else "fitted")
    assert spec.values.rotated == (spec.values.bits < 4)


@pytest.mark.parametrize("bits", [2, 4])
def test_kivi_quantises_both_in_groups_of_32_and_keeps_64_tokens_exactly(bits):
    spec = CacheSpec.preset(f"kivi-{bits}")
    assert spec.keys == ChannelQuantisedKeys(bits, group=32)
    assert spec.values == QuantisedValues(bits, group=32)
    assert (spec.sinks, spec.window) == (0, 64)
    assert spec.replace(window=128).exact_tokens == 128


def test_sinks_and_window_are_as_large_as_our_default_at_2048_tokens():
    h1b, baseline = (
        CacheSpec.preset(name).nbytes(small_config(head_dim=128), batch=1, max_length=2048)
        for name in ("h1b", "sinks-window")
    )
    assert baseline == h1b


def test_an_unknown_preset_is_named_beside_the_known_ones():
    with pytest.raises(ValueError, match=r"'h2b'; choose one of exact, h1b-paper, h1b, "):
        CacheSpec.preset("h2b")


# Bytes


@pytest.mark.parametrize(
    ("name", "marginal"),
    [
        ("exact", 512),
        ("h1b-paper", 100),
        ("h1b", 86),
        ("h1b-p32", 86),
        ("h1b-p32-v2", 54),
        ("h1b-256-v2", 70),
        ("h1b-64-p32-v2", 46),
        ("h1b-unscaled", 84),
        ("h1b-signs", 86),
        ("h1b-2plane", 102),
        ("h1b-2plane-v2", 70),
        ("h1b-v2", 54),
        ("h1b-v3", 70),
        ("kivi-2", 96),
        ("kivi-4", 160),
        ("sinks-window", 0),
    ],
)
def test_marginal_bytes_at_128_channels(name, marginal):
    assert CacheSpec.preset(name).bytes_per_token(128) == marginal


@pytest.mark.parametrize(
    ("name", "at_2048", "at_8192"),
    [
        ("h1b-paper", 100, 100),
        ("h1b", 102, 90),
        ("h1b-2plane", 118, 106),
        ("h1b-v2", 70, 58),
        ("kivi-2", 112, 100),
        ("sinks-window", 102, 25.5),
    ],
)
def test_bytes_with_the_window_at_128_channels(name, at_2048, at_8192):
    config = small_config(head_dim=128)
    heads = config.num_layers * config.num_kv_heads
    for context, expected in ((2048, at_2048), (8192, at_8192)):
        total = CacheSpec.preset(name).nbytes(config, batch=3, max_length=context)
        assert total == heads * 3 * context * expected


def test_exact_bytes_follow_the_compute_dtype():
    spec = CacheSpec.preset("exact")
    assert spec.bytes_per_token(64, jnp.float32) == 2 * spec.bytes_per_token(64) == 512
    assert CacheSpec("v", values=QuantisedValues(4)).bytes_per_token(64, jnp.float32) == 256 + 36


@pytest.mark.parametrize("spec", [*PRESETS.values(), *CUSTOM], ids=lambda spec: spec.name)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_a_cache_allocates_what_its_spec_says_to_the_byte(spec, dtype):
    for head_dim in HEAD_DIMS:
        if spec.name.startswith("kivi") and head_dim % 32:
            continue
        for kv_heads, batch, max_length in ((1, 1, 1), (3, 2, 128), (2, 5, 1000)):
            config = small_config(head_dim=head_dim, num_heads=6, num_kv_heads=kv_heads)
            sizes = {"batch": batch, "max_length": max_length, "dtype": dtype}
            cache = jax.eval_shape(lambda c=config, s=sizes: KVCache.init(c, spec, **s))
            leaves = [
                leaf
                for field in dataclasses.fields(cache)
                if field.name != "lengths"
                for leaf in jax.tree.leaves(getattr(cache, field.name))
                if isinstance(leaf, jax.ShapeDtypeStruct)
            ]
            allocated = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            assert allocated == spec.nbytes(config, **sizes)


@pytest.mark.parametrize("spec", [*PRESETS.values(), *CUSTOM], ids=lambda spec: spec.name)
def test_nbytes_counts_the_arrays_that_exist(spec):
    config = small_config()
    cache = KVCache.init(config, spec, batch=3, max_length=200)
    assert cache.nbytes == spec.nbytes(config, batch=3, max_length=200)


@pytest.mark.parametrize(
    ("asked", "capacity"), [(1, 128), (128, 128), (129, 256), (1024, 1024), (1025, 1152)]
)
def test_capacities_are_whole_blocks_of_128(asked, capacity):
    assert padded_capacity(asked) == capacity
    assert KVCache.init(small_config(), PRESETS["h1b"], batch=1, max_length=asked).capacity == (
        capacity
    )


# Errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sinks": -1, "window": 8}, "sinks=-1 and window=8 must not be negative"),
        ({"window": -8}, "sinks=0 and window=-8 must not be negative"),
        ({"sinks": 4}, "sinks=4 need a window of at least 1 token"),
        ({"keys": None, "values": None, "window": 8}, "an exact cache needs no window"),
        ({"keys": None, "scores": "corrected"}, "but keys are exact"),
        ({"keys": None, "rope_period": 32}, "but keys are exact"),
        ({"scores": "best"}, "scores='best'; use 'raw', 'corrected' or 'fitted'"),
        ({"keys": GaussianSigns(), "scores": "corrected"}, "GaussianSigns has no variance"),
        ({"keys": LinearCode(), "scores": "corrected"}, "LinearCode has no variance correction"),
        ({"rope_period": 48}, "rope_period=48 must divide 128"),
        ({"rope_period": 256}, "rope_period=256 must divide 128"),
        ({"rope_period": 0}, "rope_period=0 must divide 128"),
        ({"rope_period": -32}, "rope_period=-32 must divide 128"),
        ({"keys": GaussianSigns(), "rope_period": 32}, "finite rope_period needs an unsigned"),
        ({"keys": ChannelQuantisedKeys(), "window": 31}, "window=31 must be at least 32"),
        ({"keys": ChannelQuantisedKeys(), "scores": "corrected"}, "but keys are quantised"),
        ({"keys": ChannelQuantisedKeys(), "rope_period": 32}, "but keys are quantised"),
        ({"window": 8, "evict": True}, "evict=True stores nothing, so keys and values must be"),
        ({"keys": None, "values": None, "evict": True}, "evict=True needs a window"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(fields, message):
    valid = {"keys": OrthogonalSigns(), "values": QuantisedValues(4)}
    with pytest.raises(ValueError, match=f"cache spec 'mine': .*{message}"):
        CacheSpec("mine", **(valid | fields))


def test_all_problems_of_a_spec_are_reported_together():
    with pytest.raises(ValueError, match="must not be negative; rope_period=48 must divide 128"):
        CacheSpec("mine", TwoPlanes(), window=-1, rope_period=48)


def test_replacing_checks_again():
    spec = CacheSpec.preset("h1b")
    assert spec.replace(window=124).exact_tokens == 128
    with pytest.raises(ValueError, match="rope_period=48"):
        spec.replace(rope_period=48)


@pytest.mark.parametrize("max_length", [0, -5])
def test_a_capacity_that_is_not_positive_is_refused(max_length):
    message = f"max_length={max_length} must be positive"
    with pytest.raises(ValueError, match=message):
        padded_capacity(max_length)
    with pytest.raises(ValueError, match=message):
        KVCache.init(small_config(), PRESETS["h1b"], batch=1, max_length=max_length)


def test_a_batch_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="batch=0 must be positive"):
        KVCache.init(small_config(), PRESETS["h1b"], batch=0, max_length=8)


def test_a_cache_longer_than_the_models_sliding_window_is_refused():
    config = small_config(sliding_window=200)
    message = "max_length=201 exceeds the model's sliding window of 200 tokens"
    with pytest.raises(ValueError, match=message):
        KVCache.init(config, PRESETS["h1b"], batch=1, max_length=201)
    assert KVCache.init(config, PRESETS["h1b"], batch=1, max_length=200).capacity == 256


def test_a_sketch_that_does_not_pack_is_refused():
    spec = CacheSpec("odd", OrthogonalSigns(40))
    with pytest.raises(ValueError, match="a sketch of 40 bits does not pack"):
        KVCache.init(small_config(), spec, batch=1, max_length=8)
    with pytest.raises(ValueError, match="a sketch of 40 bits does not pack"):
        spec.nbytes(small_config(), batch=1, max_length=8)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (CacheSpec.preset("kivi-4"), "32 channels need a head dimension .* multiple of 32, got 48"),
        (
            CacheSpec("wide", ChannelQuantisedKeys(4, group=128), window=128),
            "groups of 128 keys need a head dimension that is a multiple of 32, got 48",
        ),
    ],
    ids=["values", "keys"],
)
def test_a_head_dimension_that_does_not_divide_into_groups_is_refused(spec, message):
    config = small_config(head_dim=48)
    with pytest.raises(ValueError, match=message):
        spec.check_head_dim(48)
    with pytest.raises(ValueError, match=message):
        KVCache.init(config, spec, batch=1, max_length=8)
    with pytest.raises(ValueError, match=message):
        spec.nbytes(config, batch=1, max_length=8)
