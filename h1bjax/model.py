"""A model that is ready to use: weights, tokenizer and cache in one immutable object."""

import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Key

from h1bjax.cache import PRESETS, UNCALIBRATED, CacheSpec, CodecParameters, KVCache, random_rotation
from h1bjax.calibration_file import (
    calibrated_names,
    find_calibration,
    is_calibratable,
    needs_calibration,
)
from h1bjax.checkpoint import load_parameters, resolve_model, save_pretrained
from h1bjax.config import LlamaConfig
from h1bjax.decoder import Decoder, fold_value_rotation, init_codec
from h1bjax.generate import Control, DecodeState, decode, decode_step, prefill
from h1bjax.output import GenerateOutput, RowText, StreamStep
from h1bjax.request import (
    GenerateOptions,
    Prompt,
    check_tokens,
    encode_prompts,
    prepare_cache,
    prepare_control,
)
from h1bjax.sharding import (
    check_mesh,
    make_mesh,
    parameter_sharding,
    place_by_heads,
    to_host,
)
from h1bjax.tokenizer import Tokenizer


def load(
    path_or_id: str | PathLike[str] | None = None,
    *,
    cache: str | CacheSpec = "h1b",
    dtype: DTypeLike | None = None,
    seed: int = 0,
    mesh: Mesh | str | None = None,
) -> "Model":
    """Loads a Llama-family checkpoint for generation from a compressed cache.

    A calibration beside the weights that fits the cache is used. Without one, codecs that can
    use random projections do so, and "h1b", "h1b-v3" and "h1b-v2" give way to the presets of the
    same bytes that can, with a warning.

    Args:
        path_or_id: a folder in Hugging Face layout, or a hub id; by default the small model that
            ships inside the package.
        cache: a preset's name or a spec of your own.
        dtype: of weights and computation; by default the checkpoint's.
        seed: of the random projections that an uncalibrated cache uses.
        mesh: devices to divide everything over, see `h1bjax.sharding`; text such as
            "batch=2,tensor=4" stands for `make_mesh` of it. None takes one device.

    Raises:
        FileNotFoundError: there is no such folder or hub id, or it lacks a file.
        ValueError: the model or cache is not supported, the weights do not fit the config, the
            cache needs a calibration and there is none, or a calibration was made for other
            weights or is damaged, or the mesh does not suit the devices or the model.
    """
    spec = CacheSpec.preset(cache) if isinstance(cache, str) else cache
    stand_in = _stand_in(spec)
    # The hub delivers no calibrations, so a cache that needs one is refused before gigabytes come.
    folder = resolve_model(path_or_id, config_only=stand_in is None and needs_calibration(spec))
    config = LlamaConfig.from_hf(folder)
    spec.check_head_dim(config.head_dim)
    if isinstance(mesh, str):
        mesh = make_mesh(mesh)
    sharding = None
    if mesh is not None:
        check_mesh(mesh, config)
        sharding = parameter_sharding(mesh, config)
    calibration = find_calibration(folder, spec) if is_calibratable(spec) else None
    if calibration is None:
        advice = _advice(spec, path_or_id, folder)
        if stand_in is not None:
            warnings.warn(
                f"the cache {spec.name!r} is not calibrated for this model, so {stand_in.name!r}, "
                f"of as many bytes, stands in for it; {advice}",
                stacklevel=2,
            )
            spec, calibration = stand_in, find_calibration(folder, stand_in)
        elif needs_calibration(spec):
            raise ValueError(
                f"the cache {spec.name!r} needs a calibration, and there is none for this model; "
                f"{advice}"
            )
        elif spec.sketch is not None:
            warnings.warn(
                f"the cache {spec.name!r} is not calibrated for this model: it uses random "
                f"projections and may lose quality; {advice}",
                stacklevel=2,
            )
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model"))
    tokenizer = Tokenizer.from_pretrained(folder) if has_tokenizer else None
    parameters = load_parameters(folder, config, dtype or config.dtype, sharding)
    if calibration is None:
        codec, rotation = random_projections(config, spec, seed)
    else:
        codec, rotation = calibration.codec, calibration.rotation
    if rotation is not None:
        rotation = place_by_heads(mesh, rotation)
        parameters = fold_value_rotation(config, parameters, rotation)
    return Model(Decoder(config, parameters, spec, codec, mesh), tokenizer)


def _stand_in(spec: CacheSpec) -> CacheSpec | None:
    """The preset that takes the place of an uncalibrated one, if it has such a preset."""
    if PRESETS.get(spec.name) != spec or spec.name not in UNCALIBRATED:
        return None
    return PRESETS[UNCALIBRATED[spec.name]]


def _advice(spec: CacheSpec, path_or_id: str | PathLike[str] | None, folder: Path) -> str:
    """How to calibrate."""
    advice = "h1bjax.calibrate.calibrate makes one for a spec of your own"
    if PRESETS.get(spec.name) == spec:
        model = "" if path_or_id is None else f"--model {shlex.quote(str(path_or_id))} "
        advice = (
            f"calibrate it with: h1bjax calibrate {model}--text FILE --cache {spec.name} --out DIR"
        )
    if names := calibrated_names(folder):
        advice += f" (there are calibrations for {', '.join(names)})"
    return advice


def random_projections(
    config: LlamaConfig, spec: CacheSpec, seed: int
) -> tuple[CodecParameters | None, Array | None]:
    """What an uncalibrated cache uses: codec parameters and the rotation of the values."""
    codec_key, rotation_key = jax.random.split(jax.random.key(seed))
    rotation = None
    if spec.values is not None and spec.values.rotated:
        rotation = random_rotation(
            rotation_key, config.num_layers, config.num_kv_heads, config.head_dim
        )
    return init_codec(config, spec, codec_key), rotation


@dataclass(frozen=True)
class Model:
    """A decoder with its tokenizer.

    Attributes:
        decoder: the weights and the codec of the cache.
        tokenizer: None where the checkpoint has none; prompts are token ids then.
    """

    decoder: Decoder
    tokenizer: Tokenizer | None

    @property
    def config(self) -> LlamaConfig:
        """The model's shape and arithmetic."""
        return self.decoder.config

    @property
    def spec(self) -> CacheSpec:
        """The cache that generation uses."""
        return self.decoder.spec

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | Key[Array, ""] = 0,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        logprobs: bool = False,
        cache: KVCache | None = None,
        max_length: int | None = None,
        exact_prefill: bool = False,
    ) -> GenerateOutput:
        """Continues each prompt.

        A row's tokens do not depend on the other rows. Prefill and decoding compile once for
        each batch size, bucket of prompt lengths and cache capacity; the other arguments are
        traced.

        Args:
            prompts: one prompt or several: text, token ids, or chat messages, of which the
                tokenizer's own template makes text. Text gets the special tokens that the
                tokenizer adds, unless it continues a cache.
            max_new_tokens: the most tokens each row gets.
            temperature: divides the logits; 0, the default, takes the most probable token.
            top_k: keeps the k most probable tokens; 0 keeps all.
            top_p: keeps the most probable tokens that reach this probability; 1 keeps all.
            min_p: keeps tokens at least this fraction as probable as the best; 0 keeps all.
            seed: an integer or a PRNG key. A row's sample depends on its index, not on the others.
            stop: texts that end a row; they are not part of the output text.
            stop_ids: token ids that end a row, besides those that the checkpoint names.
            logprobs: whether to return log-probabilities.
            cache: the cache of an earlier output, to continue each of its rows. It is consumed,
                and grown by a copy if it is too small.
            max_length: tokens to reserve per row, so that later turns need not grow the cache.
            exact_prefill: whether prompts attend to themselves exactly and are compressed only
                for decoding.

        Raises:
            ValueError: an argument is invalid; the message names it.
            FloatingPointError: the model's logits are not finite.
        """
        options = GenerateOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop,
            stop_ids=stop_ids,
            cache=cache,
            max_length=max_length,
            exact_prefill=exact_prefill,
        )
        encoded, state, control = self._start(prompts, options)
        # Decoding no steps compiles, so that the clock sees only decoding.
        state = decode(self.decoder, state, replace(control, limit=jnp.int32(0)))
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state = decode(self.decoder, state, control)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin

        _check_finite(state)
        rows = len(encoded)
        tokens = [row[row >= 0].tolist() for row in to_host(state.tokens)[:rows]]
        scores = [
            row[: len(ids)].tolist()
            for row, ids in zip(to_host(state.logprobs)[:rows], tokens, strict=True)
        ]
        return GenerateOutput(
            text=self._texts(encoded, tokens, tuple(stop)),
            tokens=tokens,
            logprobs=scores if logprobs else None,
            finish_reasons=[
                "stop" if done else "length" for done in to_host(state.done)[:rows].tolist()
            ],
            cache=state.cache,
            decode_seconds=seconds,
        )

    def stream(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> Iterator[StreamStep]:
        """Continues each prompt step by step.

        Args:
            prompts: as in `generate`.
            **options: those of `generate`, `logprobs` excepted, with the same defaults. They are
                checked when the first step is asked for.

        Yields:
            The new token and text of every row; the same as `generate` would return.

        Raises:
            ValueError: an option is invalid; the message names it.
            FloatingPointError: the model's logits are not finite.
        """
        chosen = GenerateOptions(**options)
        encoded, state, control = self._start(prompts, chosen)
        rows = self._rows(encoded, tuple(chosen.stop))
        finished = [False] * len(encoded)
        for step in range(chosen.max_new_tokens):
            state = decode_step(self.decoder, state, control)
            _check_finite(state)
            column = to_host(state.tokens)[: len(encoded), step].tolist()
            last = step == chosen.max_new_tokens - 1
            tokens = [token if token >= 0 else None for token in column]
            ended = [done or last for done in to_host(state.done)[: len(encoded)].tolist()]
            text = None
            if rows is not None:
                text = []
                for index, token in enumerate(tokens):
                    delta = ""
                    if token is not None:
                        delta, rows[index] = rows[index].push(token)
                    if ended[index] and not finished[index]:
                        delta += rows[index].finish()
                    text.append(delta)
            finished = ended
            yield StreamStep(text, tokens, finished, state.cache)
            if all(finished):
                return

    def save_pretrained(
        self, folder: str | PathLike[str], source: str | PathLike[str] | None = None
    ) -> None:
        """Writes the weights as a folder that transformers and `load` load.

        They are those of this decoder, in its dtype and with the cache's value rotation, if any,
        folded in: other weights than the checkpoint's, for which its calibrations do not hold.
        So calibrations are not copied.

        Args:
            folder: new or empty.
            source: a folder whose tokenizer and generation files are copied.
        """
        save_pretrained(folder, self.config, self.decoder.parameters(), source=source)

    def _start(
        self, prompts: Prompt | Sequence[Prompt], options: GenerateOptions
    ) -> tuple[list[list[int]], DecodeState, Control]:
        continued = options.cache is not None
        encoded = encode_prompts(prompts, self.tokenizer, continued=continued)
        check_tokens(encoded, self.config.vocab_size)
        control = prepare_control(self.decoder, self.tokenizer, options)
        cache = prepare_cache(self.decoder, encoded, options)
        idle: list[list[int]] = [[]] * (cache.batch - len(encoded))
        logits, cache = prefill(self.decoder, encoded + idle, cache, exact=options.exact_prefill)
        state = DecodeState.start(
            cache,
            logits,
            control.stop_strings,
            options.max_new_tokens,
            rows=len(encoded),
            mesh=self.decoder.mesh,
        )
        return encoded, state, control

    def _rows(self, prompts: list[list[int]], stop: tuple[str, ...]) -> list[RowText] | None:
        if self.tokenizer is None:
            return None
        return [RowText.after(self.tokenizer, prompt, stop) for prompt in prompts]

    def _texts(
        self, prompts: list[list[int]], tokens: list[list[int]], stop: tuple[str, ...]
    ) -> list[str] | None:
        rows = self._rows(prompts, stop)
        if rows is None:
            return None
        return [row.decode(new) for row, new in zip(rows, tokens, strict=True)]


def _check_finite(state: DecodeState) -> None:
    failed = np.flatnonzero(to_host(state.failed))
    if failed.size:
        raise FloatingPointError(
            f"the logits of row {failed[0]} are not finite; the weights may overflow in this dtype"
        )
