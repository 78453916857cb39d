from functools import partial

import float64
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.packing import (
    TOKEN_BLOCK,
    pack_column,
    pack_scalar_pair,
    scalar_index,
    to_storage,
    unpack_rows,
    unpack_scalar_pair,
    unpack_scalars,
    words_per_column,
)

pytestmark = pytest.mark.once


widths = st.sampled_from((1, 2, 3, 4))


def random_scalars(seed: int, heads: int, tokens: int) -> np.ndarray:
    """Normal bfloat16 numbers of both signs and all sizes, and zero."""
    rng = np.random.default_rng(seed)
    scalars = rng.normal(size=(heads, tokens)) * 10.0 ** rng.integers(-30, 30, (heads, tokens))
    scalars[:, 0] = 0.0
    return scalars.astype(ml_dtypes.bfloat16)


@partial(jax.jit, static_argnums=1)
def pack_and_unpack(codes, width):
    words = pack_column(codes, width)
    return words, unpack_rows(words.T, width, codes.shape[-1])


@settings(deadline=None, max_examples=50)
@given(width=widths, fields=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_every_bit_lies_where_the_layout_says_and_codes_are_read_back(width, fields, seed):
    codes = np.random.default_rng(seed).integers(0, 2**width, (5, fields))
    words, unpacked = pack_and_unpack(codes, width)
    assert words.dtype == unpacked.dtype == jnp.int32
    # Unused bits are zero in both.
    np.testing.assert_array_equal(words, float64.pack(codes, width))
    np.testing.assert_array_equal(unpacked, codes.T)


def test_a_word_of_nibbles_written_out():
    # One word: byte b and plane p hold field 4p + b.
    codes = jnp.asarray([1, 2, 3, 4, 5, 6, 7, 8])
    assert np.uint32(pack_column(codes, 4)[0]) == 0x84_73_62_51


def test_three_bit_codes_are_two_low_bits_followed_by_the_high_bit():
    codes = jnp.asarray([0b101, 0b010, 0b111, 0b000])
    low, high = pack_column(codes, 3)
    assert low == (0b01 | 0b10 << 8 | 0b11 << 16)
    assert high == (1 | 1 << 16)


@pytest.mark.parametrize(
    ("fields", "width", "words"),
    [(128, 1, 4), (128, 2, 8), (128, 3, 12), (128, 4, 16), (8, 3, 2), (80, 3, 8), (33, 1, 2)],
)
def test_words_per_column(fields, width, words):
    assert words_per_column(fields, width) == words


def test_packing_and_unpacking_keep_leading_axes():
    codes = np.random.default_rng(0).integers(0, 16, (2, 3, 7, 40))
    words = pack_column(jnp.asarray(codes), 4)
    assert words.shape == (2, 3, 7, 5)
    rows = jnp.moveaxis(words, -1, -2)
    np.testing.assert_array_equal(unpack_rows(rows, 4, 40), np.moveaxis(codes, -1, -2))


@pytest.mark.parametrize(("blocks", "heads"), [(1, 1), (3, 2)])
def test_scalars_written_by_index_are_read_back_in_token_order(blocks, heads):
    capacity = blocks * TOKEN_BLOCK
    scalars = random_scalars(0, heads, capacity)
    half, column = scalar_index(jnp.arange(capacity), capacity)
    paired = np.zeros((heads, 2, capacity // 2), np.uint16)
    paired[:, half, column] = to_storage(jnp.asarray(scalars))
    read = unpack_scalars(jnp.asarray(paired.reshape(2 * heads, -1)))
    assert read.dtype == jnp.float32
    np.testing.assert_array_equal(read, scalars.astype(np.float32))


@pytest.mark.parametrize(
    ("position", "half", "column"),
    [(0, 0, 0), (63, 0, 63), (64, 1, 0), (127, 1, 63), (128, 0, 64), (200, 1, 72), (255, 1, 127)],
)
def test_a_block_puts_its_first_64_scalars_in_the_first_row(position, half, column):
    assert scalar_index(jnp.int32(position), 256) == (half, column)


@pytest.mark.parametrize("position", [256, 257, 300, 320, 511, 10_000])
def test_a_scalar_beyond_the_capacity_has_no_column(position):
    _, column = scalar_index(jnp.int32(position), 256)
    assert column >= 256 // 2


def test_scalars_are_stored_as_the_bit_patterns_of_bfloat16():
    one_and_minus_two = jnp.asarray([1.0, -2.0], jnp.bfloat16)
    assert to_storage(one_and_minus_two).tolist() == [0x3F80, 0xC000]


def test_a_pair_of_scalars_has_the_first_in_the_high_half_of_its_word():
    high, low = (jnp.asarray(x, jnp.bfloat16) for x in ([1.0, -2.0], [-2.0, 1.0]))
    words = pack_scalar_pair(high, low)
    assert words.dtype == jnp.int32
    assert np.asarray(words).view(np.uint32).tolist() == [0x3F80_C000, 0xC000_3F80]


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_pair_of_scalars_is_read_back(seed):
    first, second = random_scalars(seed, 2, 128)
    read = unpack_scalar_pair(pack_scalar_pair(jnp.asarray(first), jnp.asarray(second)))
    for half, expected in zip(read, (first, second), strict=True):
        assert half.dtype == jnp.float32
        np.testing.assert_array_equal(half, expected.astype(np.float32))


@pytest.mark.parametrize("width", [0, 5, 8])
def test_other_widths_are_refused(width):
    message = f"codes of {width} bits are not supported; use 1, 2, 3 or 4"
    with pytest.raises(ValueError, match=message):
        words_per_column(8, width)
    with pytest.raises(ValueError, match=message):
        pack_column(jnp.zeros((2, 8), jnp.int32), width)
    with pytest.raises(ValueError, match=message):
        unpack_rows(jnp.zeros((1, 2), jnp.int32), width, 8)


def test_rows_that_do_not_hold_the_codes_are_refused():
    with pytest.raises(ValueError, match="40 codes of 4 bits need 5 rows of words, got 4"):
        unpack_rows(jnp.zeros((4, 128), jnp.int32), 4, 40)
