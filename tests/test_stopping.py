import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h1bjax.stopping import StopStrings, cut_at_stop

pytestmark = pytest.mark.once


# Tokens that overlap, split characters ("é" is two bytes), repeat, and have no bytes at all.
VOCABULARY = (b"a", b"b", b"c", b"ab", b"ba", b"aab", b"", b"\xc3", b"\xa9", b"bca", "é".encode())
STOPS = st.lists(st.text("abcé", min_size=1, max_size=5), max_size=4)


@jax.jit
def matches(stops: StopStrings, tokens: jax.Array) -> jax.Array:
    """Whether each row has matched after each of its tokens: bool [tokens, batch]."""

    def step(state, column):
        state = stops.advance(state, column)
        return state, stops.matched(state)

    return jax.lax.scan(step, stops.initial(tokens.shape[0]), tokens.T)[1]


def oracle(stop_strings: list[str], tokens: np.ndarray, vocabulary=VOCABULARY) -> np.ndarray:
    wanted = [stop.encode() for stop in stop_strings]
    rows = []
    for row in tokens:
        texts = [b"".join(vocabulary[t] for t in row[:end]) for end in range(1, len(row) + 1)]
        rows.append([any(stop in text for stop in wanted) for text in texts])
    return np.array(rows).T


@settings(deadline=None, max_examples=300)
@given(stop_strings=STOPS, seed=st.integers(0, 2**32 - 1))
def test_a_row_matches_from_the_token_on_that_completes_a_stop_string(stop_strings, seed):
    tokens = np.random.default_rng(seed).integers(0, len(VOCABULARY), (8, 12)).astype(np.int32)
    stops = StopStrings.build(stop_strings, VOCABULARY)
    np.testing.assert_array_equal(matches(stops, tokens), oracle(stop_strings, tokens))


@pytest.mark.parametrize(
    ("stop_strings", "text", "at"),
    [
        (["abab"], "aababab", 5),  # falls back to a shorter prefix
        (["abcd", "bc"], "abcd", 3),  # a stop string inside another one
        (["bc", "bc"], "abc", 3),  # given twice
        (["b", "bcd"], "bcd", 1),  # one begins like another
        (["é"], "aé", 3),  # its second byte completes it
        (["ü"], "é", None),
    ],
)
def test_automaton_over_single_bytes(stop_strings, text, at):
    vocabulary = [bytes([byte]) for byte in range(256)]
    stops = StopStrings.build(stop_strings, vocabulary)
    found = np.asarray(matches(stops, jnp.asarray([list(text.encode())], jnp.int32)))[:, 0]
    assert found.tolist() == [at is not None and step >= at for step in range(1, len(found) + 1)]


def test_rows_match_on_their_own():
    stops = StopStrings.build(["ab"], VOCABULARY)
    found = matches(stops, jnp.asarray([[0, 1, 2], [0, 2, 1], [2, 3, 0]], jnp.int32))
    assert found.T.tolist() == [[False, True, True], [False] * 3, [False, True, True]]


def test_without_stop_strings_the_table_is_tiny_and_nothing_matches():
    stops = StopStrings.build([], VOCABULARY * 1000)
    assert stops.next_state.nbytes <= 8
    assert not matches(stops, jnp.arange(11, dtype=jnp.int32)[None]).any()


@pytest.mark.parametrize("outside", [-1, -200, len(VOCABULARY), 100_000])
def test_ids_outside_the_vocabulary_change_nothing(outside):
    stops = StopStrings.build(["ab"], VOCABULARY)
    found = matches(stops, jnp.asarray([[0, outside, 1, outside]], jnp.int32))
    assert found[:, 0].tolist() == [False, False, True, True]


def test_other_stop_strings_of_like_length_do_not_recompile():
    traces = []

    @jax.jit
    def advance(stops, state, tokens):
        traces.append(stops)
        return stops.advance(state, tokens)

    for stop_strings in (["ab"], ["abcab"], ["a", "b", "c"], ["éé", "cab"]):
        stops = StopStrings.build(stop_strings, VOCABULARY)
        advance(stops, stops.initial(1), jnp.zeros(1, jnp.int32))
    assert len(traces) == 1


def test_states_are_a_power_of_two_that_fits_a_long_stop_string():
    stops = StopStrings.build(["ab" * 40], VOCABULARY)
    assert stops.next_state.shape == (128, len(VOCABULARY))
    assert stops.next_state.dtype == jnp.int16


@pytest.mark.parametrize(
    ("stop_strings", "message"),
    [
        (["a", ""], "non-empty strings, not ''"),
        (["a", 3, ""], "non-empty strings, not 3, ''"),
        ("stop", r"must be a sequence of strings; write \['stop'\]"),
    ],
)
def test_unusable_stop_strings_are_refused(stop_strings, message):
    with pytest.raises(ValueError, match=message):
        StopStrings.build(stop_strings, VOCABULARY)
    with pytest.raises(ValueError, match=message):
        cut_at_stop("text", stop_strings)


def test_a_large_vocabulary_builds_in_seconds():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.geometric(0.15, 128_000), 60)
    vocabulary = [random.bytes(length) for length in lengths]
    begin = time.perf_counter()
    stops = StopStrings.build(["\n\nUser:", "<|end|>", "Observation:", "###"], vocabulary)
    assert stops.next_state.shape == (32, 128_000)
    # About half a second on one core; the margin is for busy machines.
    assert time.perf_counter() - begin < 10


def test_text_is_cut_where_the_first_stop_string_begins():
    assert cut_at_stop("one two three", ["three", "two"]) == "one "
    assert cut_at_stop("one two three", ["four"]) == "one two three"
    assert cut_at_stop("one two three", []) == "one two three"
    assert cut_at_stop("one", ["one"]) == ""
    # "bc" is complete first, whichever tokens bring the text.
    assert cut_at_stop("abcd", ["abcd", "bc"]) == "a"
    # Both are complete at once: nothing of the longer one is left.
    assert cut_at_stop("xabc", ["bc", "abc"]) == "x"


@settings(deadline=None, max_examples=200)
@given(stop_strings=STOPS, text=st.text("abcé", max_size=12), more=st.text("abcé", max_size=4))
def test_a_cut_text_holds_no_stop_string_and_ignores_what_follows(stop_strings, text, more):
    cut = cut_at_stop(text, stop_strings)
    assert text.startswith(cut)
    assert not any(stop in cut for stop in stop_strings)
    assert (cut == text) == (not any(stop in text for stop in stop_strings))
    if cut != text:
        assert cut_at_stop(text + more, stop_strings) == cut
