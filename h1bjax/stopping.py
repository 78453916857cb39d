"""Stop strings found on the device, token by token.

An Aho-Corasick automaton over UTF-8 bytes (Aho and Corasick 1975) is lifted to tokens: following
all bytes of a token is one step, so a single table look-up per row and token tells whether the text
generated so far contains a stop string, also one that begins in one token and ends in another.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

# Few enough to stay small beside any vocabulary, enough that usual stop strings share one shape.
_MIN_STATES = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StopStrings:
    """The automaton as a table; a pytree, so other stop strings of the same shape reuse a jit.

    State 0 has matched nothing and the last state has found a stop string, which it never leaves.

    Attributes:
        next_state: The state after each token, by state and token id; int16, or int32 where there
            are more states than that holds. The number of states is a power of two.
    """

    next_state: Int[Array, "states vocab"]

    @classmethod
    def build(cls, stop_strings: Sequence[str], token_bytes: Sequence[bytes]) -> StopStrings:
        """Builds the table on the host.

        Args:
            stop_strings: The texts that end a row; none at all gives a table that never matches.
            token_bytes: The UTF-8 bytes of every token id, b"" for tokens without text; see
                `Tokenizer.token_bytes`.

        Raises:
            ValueError: If `stop_strings` is one string instead of a sequence of them, or an entry
                is empty or not a string.
        """
        stops = _checked(stop_strings)
        if not stops:
            return cls(jnp.zeros((2, 1), jnp.int16))
        transitions = _byte_automaton([stop.encode() for stop in stops])
        table = _lift_to_tokens(transitions, token_bytes)
        accepting = len(table) - 1
        states = max(_MIN_STATES, 1 << accepting.bit_length())
        dtype = np.int16 if states <= np.iinfo(np.int16).max else np.int32
        padded = np.full((states, table.shape[1]), states - 1, dtype)
        padded[:accepting] = np.where(table[:accepting] == accepting, states - 1, table[:accepting])
        return cls(jnp.asarray(padded))

    def initial(self, batch: int) -> Int32[Array, "batch"]:
        """The state of rows that have no text yet."""
        return jnp.zeros(batch, jnp.int32)

    def advance(
        self, state: Int32[Array, "batch"], tokens: Int32[Array, "batch"]
    ) -> Int32[Array, "batch"]:
        """The state of each row after one more token; ids outside the table change nothing."""
        vocab = self.next_state.shape[1]
        known = (tokens >= 0) & (tokens < vocab)
        following = self.next_state[state, jnp.clip(tokens, 0, vocab - 1)].astype(jnp.int32)
        return jnp.where(known, following, state)

    def matched(self, state: Int32[Array, "batch"]) -> Bool[Array, "batch"]:
        """Whether the text of each row contains a stop string."""
        return state == self.next_state.shape[0] - 1


def cut_at_stop(text: str, stop_strings: Sequence[str]) -> str:
    """The text up to where the first stop string begins; all of it when there is none.

    The first is the one that is complete first, as a reader who stops at once would find it; of
    several that end at the same character, the longest.

    Raises:
        ValueError: As `StopStrings.build`.
    """
    ends = [
        (begin + len(stop), begin)
        for stop in _checked(stop_strings)
        if (begin := text.find(stop)) >= 0
    ]
    return text[: min(ends)[1]] if ends else text


def could_begin_stop(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    return max(
        (
            length
            for stop in stop_strings
            for length in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:length])
        ),
        default=0,
    )


def _checked(stop_strings: Sequence[str]) -> list[str]:
    if isinstance(stop_strings, str):
        raise ValueError(
            f"stop_strings must be a sequence of strings; write [{stop_strings!r}] for a single one"
        )
    stops = list(stop_strings)
    wrong = [repr(stop) for stop in stops if not isinstance(stop, str) or not stop]
    if wrong:
        raise ValueError(f"stop strings must be non-empty strings, not {', '.join(wrong)}")
    return stops


def _byte_automaton(patterns: Sequence[bytes]) -> np.ndarray:
    """Aho-Corasick with all accepting states merged into the last one.

    Returns:
        int32 [states, 256], the state after each byte.
    """
    children: list[dict[int, int]] = [{}]
    ends = [False]
    for pattern in patterns:
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                ends.append(False)
            node = children[node][byte]
        ends[node] = True
    # Breadth first, so that the state of the longest proper suffix (`failure`) is already complete.
    transitions = np.zeros((len(children), 256), np.int32)
    failure = [0] * len(children)
    queue = deque([0])
    while queue:
        node = queue.popleft()
        ends[node] = ends[node] or ends[failure[node]]
        if node:
            transitions[node] = transitions[failure[node]]
        for byte, child in children[node].items():
            failure[child] = int(transitions[node, byte]) if node else 0
            transitions[node, byte] = child
            queue.append(child)
    accepting = np.array(ends)
    # States that extend an accepting one are unreachable once it is absorbing, and are dropped.
    kept = np.flatnonzero(~accepting)
    renamed = np.full(len(children), len(kept), np.int32)
    renamed[kept] = np.arange(len(kept))
    absorbing = np.full((1, 256), len(kept), np.int32)
    return np.concatenate([renamed[transitions[kept]], absorbing])


def _lift_to_tokens(transitions: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """The state after all bytes of each token: int32 [states, vocab]."""
    lengths = np.array([len(data) for data in token_bytes])
    starts = np.cumsum(lengths) - lengths
    data = np.frombuffer(b"".join(token_bytes), np.uint8)
    # Longest first: the tokens that have a byte at some position are then the leading rows.
    order = np.argsort(-lengths, kind="stable")
    states = len(transitions)
    by_byte = np.ascontiguousarray(transitions.T).ravel()
    table = np.tile(np.arange(states, dtype=np.int32), (len(lengths), 1))
    for position in range(int(lengths.max(initial=0))):
        alive = np.count_nonzero(lengths > position)
        first = data[starts[order[:alive]] + position].astype(np.int32) * states
        table[:alive] = by_byte[table[:alive] + first[:, None]]
    unsorted = np.empty_like(order)
    unsorted[order] = np.arange(len(order))
    return table.T[:, unsorted]
