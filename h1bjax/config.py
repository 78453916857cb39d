"""Model shape and arithmetic, read from a Hugging Face config.json of the Llama family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeGuard

from h1bjax.json_file import read_json_object

DTYPES = ("float32", "bfloat16", "float16")
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding.

    Attributes:
        type: "default", "linear" (every frequency divided by `factor`) or "llama3" (only the low
            frequencies divided, with a smooth passage to the high ones).
        theta: base of the geometric series of frequencies.
        factor: divisor of frequencies; read by "linear" and "llama3".
        low_freq_factor: wavelengths above `original_max_position_embeddings / low_freq_factor`
            are divided in full; read by "llama3".
        high_freq_factor: wavelengths below `original_max_position_embeddings / high_freq_factor`
            are left alone; read by "llama3".
        original_max_position_embeddings: context length in tokens before the extension; read by
            "llama3".
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class _Family:
    """What transformers assumes for one model_type when config.json omits a key.

    An omitted key has the default given here; an explicit null asks for the derived value.
    """

    architecture: str
    max_position_embeddings: int
    num_kv_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / heads
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    qkv_bias: bool | None = None  # None: the key attention_bias decides
    output_bias: bool | None = None  # None: the key attention_bias decides
    reads_mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    slides: str = "never"  # "never", "always" (every layer), "by layer" (Qwen's switches)


_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", 2048, None, None, 1, 2, reads_mlp_bias=True),
    "mistral": _Family(
        "MistralForCausalLM",
        131_072,
        8,
        None,
        1,
        2,
        qkv_bias=False,
        output_bias=False,
        sliding_window=4096,
        slides="always",
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        32_768,
        32,
        qkv_bias=True,
        output_bias=False,
        sliding_window=4096,
        slides="by layer",
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        32_768,
        32,
        128,
        qk_norm=True,
        sliding_window=4096,
        slides="by layer",
    ),
}

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL_INTEGERS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "sliding_window",
)
_BOOLEANS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")


@dataclass(frozen=True)
class LlamaConfig:
    """A decoder of the Llama family. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        model_type: "llama", "mistral", "qwen2" or "qwen3".
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; divides `num_heads`.
        head_dim: width of one head; need not be `hidden_size / num_heads`.
        max_position_embeddings: context length in tokens that the checkpoint was made for.
        rms_norm_eps: added to the mean square inside every RMS norm.
        rope: rotary position embedding.
        tie_word_embeddings: logits reuse the embedding, and no unembedding is stored.
        qkv_bias: query, key and value projections have biases.
        output_bias: the attention output projection has a bias.
        mlp_bias: gate, up and down projections have biases.
        qk_norm: queries and keys are RMS-normalised per head before RoPE.
        sliding_window: tokens that a sliding layer attends, None when no layer slides.
        dtype: the checkpoint's dtype, "float32", "bfloat16" or "float16".
        bos_token_id: beginning-of-sequence id, None when the model has none.
        eos_token_ids: every id that ends a sequence.
        sliding_layers: indices of the layers that slide; empty beside a `sliding_window` means
            all of them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_window: int | None
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    sliding_layers: tuple[int, ...] = ()

    @classmethod
    def from_hf(cls, source: str | PathLike[str] | Mapping[str, Any]) -> LlamaConfig:
        """Reads a config.json; omitted keys mean what transformers takes them to mean.

        Args:
            source: a config.json, the folder that holds it, or its parsed content. With a file
                or a folder, a generation_config.json beside it adds its end-of-sequence ids.

        Returns:
            The configuration.

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: the file is not JSON, or it describes a model that the decoder does not
                compute; every reason is listed.
        """
        generation: Mapping[str, Any] = {}
        if isinstance(source, Mapping):
            raw, where = source, "This model configuration"
        else:
            path = Path(source)
            path = path / "config.json" if path.is_dir() else path
            raw, where = read_json_object(path), str(path)
            beside = path.with_name("generation_config.json")
            if beside.is_file():
                generation = read_json_object(beside)
        problems = _problems(raw, generation)
        if problems:
            reasons = "".join(f"\n  - {problem}" for problem in problems)
            raise ValueError(f"{where} cannot be used:{reasons}")
        return _parse(raw, generation)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model, in the keys that transformers 4.40 and later read.

        RoPE is written as `rope_theta` and `rope_scaling`, and the dtype as `torch_dtype`:
        transformers 5 still reads these, and older versions read nothing else.

        Returns:
            A dictionary that `json.dumps` accepts and that `from_hf` reads back to `self`.

        Raises:
            ValueError: config.json has no words for this combination of fields.
        """
        family = _FAMILIES[self.model_type]
        eos: int | list[int] | None = list(self.eos_token_ids) or None
        if len(self.eos_token_ids) == 1:
            eos = self.eos_token_ids[0]
        written: dict[str, Any] = {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope.theta,
            "rope_scaling": _rope_scaling(self.rope),
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
        }
        if family.qkv_bias is None:
            written["attention_bias"] = self.qkv_bias
        if family.reads_mlp_bias:
            written["mlp_bias"] = self.mlp_bias
        if family.slides == "always":
            written["sliding_window"] = self.sliding_window
        if family.slides == "by layer":
            written |= self._written_sliding()
        canonical = self
        if self.sliding_window is not None and not self.sliding_layers:
            canonical = replace(self, sliding_layers=tuple(range(self.num_layers)))
        if LlamaConfig.from_hf(written) != canonical:
            raise ValueError(
                f"A config.json of model_type {self.model_type!r} cannot express {self}; check its "
                "bias, norm, RoPE and sliding-window fields against that family."
            )
        return written

    def _written_sliding(self) -> dict[str, Any]:
        """Qwen's keys for sliding layers: the newer `layer_types` and the older layer count."""
        if self.sliding_window is None:
            return {"use_sliding_window": False, "sliding_window": None}
        sliding = self.sliding_layers or tuple(range(self.num_layers))
        return {
            "use_sliding_window": True,
            "sliding_window": self.sliding_window,
            "max_window_layers": min(sliding),
            "layer_types": [
                "sliding_attention" if layer in sliding else "full_attention"
                for layer in range(self.num_layers)
            ],
        }


def _rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    if rope.type == "default":
        return None
    if rope.type == "linear":
        # The old key "type" alone: transformers before 4.43 accepts exactly these two keys.
        return {"type": "linear", "factor": rope.factor}
    return {
        "rope_type": rope.type,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
    }


def _rope_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE keys in one flat dictionary, with transformers' order of precedence."""
    rope = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    for key, default in (
        ("rope_theta", 10_000.0),
        ("partial_rotary_factor", 1.0),
        ("original_max_position_embeddings", raw.get("max_position_embeddings")),
    ):
        if rope.get(key) is None:
            rope[key] = raw.get(key) if raw.get(key) is not None else default
    return rope


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> TypeGuard[int]:
    return _is_integer(value) and value > 0


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _problems(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    """Every reason why this configuration cannot be used."""
    problems = []
    model_type = raw.get("model_type")
    if model_type is None:
        problems.append("the key model_type is missing")
    elif str(model_type) not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        problems.append(f"model_type {model_type!r} is not supported (supported: {known})")
    missing = [key for key in _REQUIRED if raw.get(key) is None]
    if missing:
        problems.append(f"required keys are missing: {', '.join(missing)}")
    problems += _type_problems(raw, generation)
    problems += _head_problems(raw)
    problems += _rope_problems(raw)
    problems += _layer_type_problems(raw)
    if raw.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act {raw['hidden_act']!r} is not supported (supported: silu)")
    if raw.get("quantization_config") is not None:
        problems.append(
            "quantization_config is present: quantised weights are not supported, use the "
            "checkpoint that they were made from"
        )
    return problems


def _type_problems(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> list[str]:
    problems = []
    for key in (*_REQUIRED, *_OPTIONAL_INTEGERS):
        value = raw.get(key)
        if value is not None and not _is_count(value):
            problems.append(f"{key} must be a positive integer, and is {value!r}")
    for key in _BOOLEANS:
        if raw.get(key) is not None and not isinstance(raw[key], bool):
            problems.append(f"{key} must be true or false, and is {raw[key]!r}")
    full_layers = raw.get("max_window_layers", 0)
    if not (_is_integer(full_layers) and full_layers >= 0):
        problems.append(f"max_window_layers must be an integer of at least 0, and is {full_layers}")
    eps = raw.get("rms_norm_eps")
    if eps is not None and not (_is_number(eps) and eps >= 0):
        problems.append(f"rms_norm_eps must be a number of at least 0, and is {eps!r}")
    bos = raw.get("bos_token_id")
    if bos is not None and not _is_integer(bos):
        problems.append(f"bos_token_id must be an integer or null, and is {bos!r}")
    for name, source in (("", raw), (" of generation_config.json", generation)):
        eos = source.get("eos_token_id")
        if not all(_is_integer(item) for item in _as_list(eos)):
            problems.append(
                f"eos_token_id{name} must be an integer, a list of them or null, and is {eos!r}"
            )
    dtype = _dtype(raw)
    if dtype not in DTYPES:
        problems.append(f"dtype {dtype!r} is not supported (supported: {', '.join(DTYPES)})")
    return problems


def _head_problems(raw: Mapping[str, Any]) -> list[str]:
    hidden, heads = raw.get("hidden_size"), raw.get("num_attention_heads")
    if not (_is_count(hidden) and _is_count(heads)):
        return []
    problems = []
    kv_heads = raw.get("num_key_value_heads", _family(raw).num_kv_heads) or heads
    if _is_count(kv_heads) and heads % kv_heads:
        problems.append(
            f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})"
        )
    head_dim = raw.get("head_dim", _family(raw).head_dim)
    if head_dim is None and hidden % heads:
        problems.append(
            f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}), and "
            "head_dim is not given"
        )
    else:
        head_dim = hidden // heads if head_dim is None else head_dim
        if _is_integer(head_dim) and head_dim % 2:
            problems.append(f"head_dim must be even for RoPE, and is {head_dim}")
    return problems


def _rope_problems(raw: Mapping[str, Any]) -> list[str]:
    for key in ("rope_scaling", "rope_parameters"):
        if raw.get(key) is not None and not isinstance(raw[key], Mapping):
            return [f"{key} must be an object or null, and is {raw[key]!r}"]
    rope = _rope_keys(raw)
    if any(isinstance(value, Mapping) for value in rope.values()):
        return ["RoPE parameters that differ between layers are not supported"]
    problems = []
    if rope["rope_type"] not in ROPE_TYPES:
        problems.append(
            f"RoPE type {rope['rope_type']!r} is not supported (supported: {', '.join(ROPE_TYPES)})"
        )
    if rope["partial_rotary_factor"] != 1:
        problems.append(
            f"partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported: RoPE must "
            "turn the whole head"
        )
    numbers = {
        "default": ("rope_theta",),
        "linear": ("rope_theta", "factor"),
        "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
    }.get(str(rope["rope_type"]), ("rope_theta",))
    for key in numbers:
        if rope.get(key) is None:
            problems.append(f"RoPE type {rope['rope_type']!r} needs the key {key}")
        elif not (_is_number(rope[key]) and rope[key] > 0):
            problems.append(f"{key} must be a positive number, and is {rope[key]!r}")
    if rope["rope_type"] == "llama3":
        original = rope["original_max_position_embeddings"]
        if original is not None and not _is_count(original):
            problems.append(
                f"original_max_position_embeddings must be a positive integer, and is {original!r}"
            )
        low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
        if _is_number(low) and _is_number(high) and high <= low:
            problems.append(f"high_freq_factor ({high}) must be above low_freq_factor ({low})")
    return problems


def _layer_type_problems(raw: Mapping[str, Any]) -> list[str]:
    layer_types = raw.get("layer_types")
    if layer_types is None:
        return []
    if not isinstance(layer_types, list):
        return [f"layer_types must be a list or null, and is {layer_types!r}"]
    problems = []
    unknown = {str(kind) for kind in layer_types} - {"full_attention", "sliding_attention"}
    if unknown:
        problems.append(f"layer_types holds unsupported types: {', '.join(sorted(unknown))}")
    layers = raw.get("num_hidden_layers")
    if _is_integer(layers) and len(layer_types) != layers:
        problems.append(f"layer_types names {len(layer_types)} layers, num_hidden_layers {layers}")
    if "sliding_attention" in layer_types and _window(raw) is None:
        problems.append(
            "layer_types holds sliding_attention, but no sliding window is set for this model "
            "(sliding_window, and use_sliding_window where the family has it)"
        )
    return problems


def _family(raw: Mapping[str, Any]) -> _Family:
    return _FAMILIES.get(str(raw.get("model_type")), _FAMILIES["llama"])


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _dtype(raw: Mapping[str, Any]) -> Any:
    return raw.get("dtype") or raw.get("torch_dtype") or "float32"


def _window(raw: Mapping[str, Any]) -> int | None:
    """The window in tokens that the family would use, before asking whether any layer does."""
    family = _family(raw)
    if family.slides == "never" or (
        family.slides == "by layer" and not raw.get("use_sliding_window")
    ):
        return None
    return raw.get("sliding_window", family.sliding_window)


def _sliding_layers(raw: Mapping[str, Any]) -> tuple[int, ...]:
    layers = range(raw["num_hidden_layers"])
    if _window(raw) is None:
        return ()
    if _family(raw).slides == "always":
        return tuple(layers)
    types = raw.get("layer_types")
    if types is None:
        return tuple(layers[raw.get("max_window_layers", 28) :])
    return tuple(layer for layer in layers if types[layer] == "sliding_attention")


def _parse(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> LlamaConfig:
    """Builds the configuration from keys in which `_problems` found no fault."""
    family = _family(raw)
    heads = raw["num_attention_heads"]
    max_positions = raw.get("max_position_embeddings") or family.max_position_embeddings
    rope = _rope_keys(raw)
    kind = rope["rope_type"]
    rope_config = RopeConfig(type=kind, theta=float(rope["rope_theta"]))
    if kind == "linear":
        rope_config = RopeConfig(kind, rope_config.theta, float(rope["factor"]))
    elif kind == "llama3":
        rope_config = RopeConfig(
            kind,
            rope_config.theta,
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            rope["original_max_position_embeddings"] or max_positions,
        )
    attention_bias = bool(raw.get("attention_bias"))
    sliding_layers = _sliding_layers(raw)
    eos = _as_list(raw.get("eos_token_id", family.eos_token_id))
    eos += _as_list(generation.get("eos_token_id"))
    eps = raw.get("rms_norm_eps")
    return LlamaConfig(
        model_type=raw["model_type"],
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads", family.num_kv_heads) or heads,
        head_dim=raw.get("head_dim", family.head_dim) or raw["hidden_size"] // heads,
        max_position_embeddings=max_positions,
        rms_norm_eps=1e-6 if eps is None else float(eps),
        rope=rope_config,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings")),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=family.reads_mlp_bias and bool(raw.get("mlp_bias")),
        qk_norm=family.qk_norm,
        sliding_window=_window(raw) if sliding_layers else None,
        dtype=_dtype(raw),
        bos_token_id=raw.get("bos_token_id", family.bos_token_id),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        sliding_layers=sliding_layers,
    )
