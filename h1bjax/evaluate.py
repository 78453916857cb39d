"""How well a model predicts a text when it reads its own cache."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from h1bjax.cache import KVCache
from h1bjax.decoder import Decoder
from h1bjax.model import Model
from h1bjax.tokenizer import Tokenizer
from h1bjax.window_scores import Loss, score_windows
from h1bjax.windows import Windows, text_windows


@dataclass(frozen=True)
class Perplexity:
    """How well a text was predicted.

    Attributes:
        total: the loss of all scored tokens.
        late: that of the tokens in the last quarter of a full window, whose context is the
            longest; None where no window reaches that far.
        cache: the cache that was read; its lengths are those of the last windows.
    """

    total: Loss
    late: Loss | None
    cache: KVCache

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-likelihood of the scored tokens, natural logarithm."""
        return self.total.nats_per_token

    @property
    def bits_per_byte(self) -> float:
        """The same total in bits, over the UTF-8 bytes of the scored tokens."""
        return self.total.bits_per_byte

    @property
    def tokens(self) -> int:
        """Scored tokens."""
        return self.total.tokens

    @property
    def bytes(self) -> int:
        """UTF-8 bytes that the scored tokens stand for."""
        return self.total.bytes

    @property
    def perplexity(self) -> float:
        """`exp(nats_per_token)`, which depends on the tokenizer; bits per byte do not."""
        return math.exp(self.nats_per_token)


def perplexity(
    model: Model,
    text: str | Sequence[str],
    *,
    context: int,
    batch: int = 8,
    tokens: int | None = None,
) -> Perplexity:
    """Scores a text through the model's cache.

    Each document is tokenised once and cut into consecutive windows of `context` tokens, the last
    of which may be shorter. Each window is read through an empty cache exactly as decoding would
    read it. Where the tokenizer adds a BOS, one stands in front of each window and every token is
    scored; otherwise the first token of each window is not.

    Args:
        model: with a tokenizer.
        text: a text or several documents; special tokens written out in it become their ids.
        context: tokens of a window, which is also the most that the cache ever holds.
        batch: windows scored at a time. It changes speed and memory, not the result.
        tokens: scores only the first windows that together have at most as many tokens.

    Raises:
        ValueError: an argument is invalid, or the text has no token to score.
        FloatingPointError: the model's logits are not finite.
    """
    tokenizer = evaluation_tokenizer(model, context, batch)
    windows = text_windows(tokenizer, model.config.vocab_size, text, context=context, tokens=tokens)
    trained = model.config.max_position_embeddings
    if windows.longest > trained:
        warnings.warn(
            f"scoring windows of {windows.longest} tokens with a model made for {trained}; "
            "quality will suffer beyond",
            stacklevel=2,
        )
    # As many rounds as `batch` asks for, of equal size.
    rounds = -(-len(windows) // batch)
    return window_perplexity(model.decoder, windows, batch=-(-len(windows) // rounds))


def window_perplexity(
    decoder: Decoder, windows: Windows, *, batch: int, length: int | None = None
) -> Perplexity:
    """`perplexity` of windows that are cut already. See `score_windows` for the arguments.

    Raises:
        FloatingPointError: the model's logits are not finite.
    """
    scores = score_windows(decoder, windows, batch=batch, length=length)
    total = Loss.create(windows, scores, windows.scored)
    assert total is not None, "text_windows makes none without a byte to score"
    return Perplexity(total, Loss.create(windows, scores, windows.late), scores.cache)


def evaluation_tokenizer(model: Model, context: int, batch: int) -> Tokenizer:
    """The model's tokenizer.

    Raises:
        ValueError: there is none, or the model cannot be evaluated in such windows.
    """
    window = model.config.sliding_window
    if context < 2:
        raise ValueError(f"context={context} must be at least 2 tokens")
    if window is not None and context > window:
        raise ValueError(
            f"context={context} exceeds the model's sliding window of {window} tokens, which the "
            "cache does not implement"
        )
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    if model.tokenizer is None:
        raise ValueError("this checkpoint has no tokenizer, so it cannot score a text")
    return model.tokenizer
