"""The model "h1bjax" of lm-evaluation-harness. Importing this module registers it."""

import hashlib
import sys
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

try:
    # The harness registers its own models only as long as there is no other.
    import lm_eval.models  # noqa: F401
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("lm_eval"):
        raise
    raise ModuleNotFoundError(
        "evaluation on tasks needs lm-evaluation-harness: pip install 'h1bjax[eval]'"
    ) from error

from h1bjax.harness.generation import GenerationRequest, generate_texts
from h1bjax.harness.scoring import Continuation, score_continuations
from h1bjax.model import Model, load
from h1bjax.tokenizer import Tokenizer

MAX_NEW_TOKENS = 256
"""How many tokens are generated where a task does not say, as with the harness's other models."""


@register_model("h1bjax")
class HarnessModel(TemplateLM):
    """A model that reads its compressed cache in every task.

    Texts become tokens as in the harness's Hugging Face model: with the special tokens that the
    tokenizer adds, unless the text begins with a BOS already. Contexts that are too long lose
    their beginning.

    Args:
        path: a folder in Hugging Face layout, a hub id, or a model that is loaded already, for
            which `cache`, `dtype`, `seed` and `mesh` are not asked.
        cache: a preset's name.
        dtype: of weights and computation, "auto" for the checkpoint's.
        batch_size: rows at a time.
        max_length: the most tokens that are read; by default those that the model is made for.
        seed: of sampling, and of the projections of an uncalibrated cache.
        mesh: devices to divide everything over, as `h1bjax.load` takes it.
        max_batch_size: not supported, being for searching a batch size.
        device: has no effect. The harness's command line always names one of PyTorch's; JAX takes
            what it finds, or what the environment variable JAX_PLATFORMS says.

    Raises:
        ValueError: an argument is not valid, or the model has no tokenizer.
    """

    def __init__(
        self,
        path: str | PathLike[str] | Model,
        cache: str = "h1b",
        dtype: str = "auto",
        batch_size: int | str = 8,
        max_length: int | None = None,
        seed: int = 0,
        mesh: str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if max_batch_size is not None or not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size={batch_size!r}, max_batch_size={max_batch_size!r}: h1bjax searches "
                "for no batch size; give batch_size, a number of at least 1"
            )
        if not isinstance(path, Model):
            path = load(
                path, cache=cache, dtype=None if dtype == "auto" else dtype, seed=seed, mesh=mesh
            )
        if path.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, and tasks are texts")
        self.model = path
        self.text_tokenizer: Tokenizer = path.tokenizer
        self.batch_size = int(batch_size)
        self.seed = seed
        self.max_length = _max_length(path, max_length)

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text.

        Raises:
            ValueError: there is none.
        """
        ids = (self.text_tokenizer.eos_token_id, *self.model.config.eos_token_ids)
        for token in ids:
            if token is not None:
                return token
        raise ValueError("the tokenizer has no token that ends a text")

    @property
    def prefix_token_id(self) -> int:
        """The id that stands in front of a text without a context: BOS, or else EOS."""
        bos = self.text_tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        if add_special_tokens is None:
            bos = self.text_tokenizer.special_tokens.get("bos_token")
            add_special_tokens = bos is None or not string.startswith(bos)
        if add_special_tokens:
            return self.text_tokenizer.encode(string)
        return self.text_tokenizer.encode_plain(string)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        quiet = disable_tqdm or not sys.stderr.isatty()
        return super().loglikelihood(requests, disable_tqdm=quiet)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            found = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [Continuation(tuple(context), tuple(tokens)) for context, tokens in found]
            counts.append(len(found))
        scores = iter(self._score(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts, shortened = [], 0
        for context, arguments in (request.args for request in requests):
            wanted = GenerationRequest.create(arguments, max_new_tokens=MAX_NEW_TOKENS)
            room = self.max_length - wanted.max_new_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={wanted.max_new_tokens} leaves no room for a prompt within "
                    f"{self.max_length} tokens"
                )
            tokens = self.tok_encode(context)
            shortened += len(tokens) > room
            prompts.append((tokens[-room:], wanted))
        self._warn_shortened(shortened)
        texts = generate_texts(self.model, prompts, batch=self.batch_size, seed=self.seed)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        scores = self._score(
            [Continuation(tuple(context), tuple(tokens)) for _, context, tokens in requests]
        )
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def _score(self, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
        self._warn_shortened(
            sum(len(one.context) + len(one.tokens) > self.max_length + 1 for one in requests)
        )
        scores = score_continuations(
            self.model.decoder, requests, batch=self.batch_size, max_length=self.max_length
        )
        return [(score.log_likelihood, score.greedy) for score in scores]

    def _warn_shortened(self, count: int) -> None:
        if count:
            warnings.warn(
                f"{count} contexts were longer than the model's {self.max_length} tokens allow "
                "and lost their beginning",
                stacklevel=3,
            )

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text = self.text_tokenizer.chat_text(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        # The model is to go on with the last message, so nothing may follow it.
        last = chat_history[-1]["content"].strip()
        begin = text.rfind(last)
        if begin < 0:
            raise ValueError("the chat template changes the last message, which cannot go on then")
        return text[: begin + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        if not chat_template:
            return None
        name = "default" if chat_template is True else chat_template
        if name not in self.text_tokenizer.chat_templates:
            raise ValueError(
                f"the tokenizer has no chat template {name!r}; it has "
                f"{', '.join(self.text_tokenizer.chat_templates) or 'none'}"
            )
        if name != "default":
            raise ValueError(f"only the chat template 'default' is applied, not {name!r}")
        return self.text_tokenizer.chat_templates[name]

    @property
    def tokenizer_name(self) -> str:
        """Names the chat templates, by which requests that the harness keeps are told apart."""
        templates = repr(sorted(self.text_tokenizer.chat_templates.items()))
        return f"h1bjax__{hashlib.sha256(templates.encode()).hexdigest()[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """What is noted beside the results: the size of the model, and its cache."""
        config, spec = self.model.config, self.model.spec
        return {
            "model_num_parameters": sum(
                array.size for array in self.model.decoder.parameters().values()
            ),
            "model_dtype": str(self.model.decoder.dtype),
            "cache": spec.name,
            "cache_bytes_per_token_and_head": spec.bytes_per_token(config.head_dim),
        }


def _max_length(model: Model, wanted: int | None) -> int:
    """Raises ValueError where the model cannot read so much."""
    window = model.config.sliding_window
    made_for = model.config.max_position_embeddings
    most = made_for if window is None else min(made_for, window)
    if wanted is None:
        return most
    if not 2 <= int(wanted) <= most:
        raise ValueError(f"max_length={wanted} must be at least 2 and at most the model's {most}")
    return int(wanted)
