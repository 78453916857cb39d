"""The model that is trained, put together from what changes and what does not.

Both are flat dictionaries: weights go by the names of `decoder_parameters`, arrays of the key
codec by `codec/` and the names of `CodecParameters`, low-rank changes of weights by `lora/` and
the name of the weight, a teacher's weights by `teacher/` and theirs. So one pytree of arrays is
all that an optimizer and a checkpoint know.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float32, Key

from h1bjax.cache import CacheSpec, CodecParameters, GaussianSigns, LinearCode
from h1bjax.config import LlamaConfig
from h1bjax.decoder import EXACT, Decoder, fold_value_rotation
from h1bjax.parameters import ParameterInfo, decoder_parameters

Trained = Literal["temperatures", "decoders", "lora", "everything"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
OF_CODEC: tuple[Trained, ...] = ("temperatures", "decoders")
"""What trains arrays of the key codec alone, and no weights."""

CODEC, LORA, TEACHER = "codec/", "lora/", "teacher/"
IN, OUT = "/in", "/out"
ROTATION = "value_rotation"


@dataclass(frozen=True)
class Scope:
    """What trains, for which cache. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        spec: the cache that the model is trained to read; the exact one trains the plain model.
        trained: "temperatures" are the temperatures and offsets of the scores; "decoders" are
            these, the mean keys, and what turns codes into keys (for codes by signs the rotation,
            which also makes them); "lora" adds changes of low rank to all matrices; "everything"
            is all weights and the decoders.
        rank: of the changes; None unless `trained` is "lora".

    Raises:
        ValueError: nothing would train, or a rank is missing or out of place.
    """

    spec: CacheSpec = EXACT
    trained: Trained = "everything"
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.trained not in TRAINED:
            raise ValueError(f"trained={self.trained!r} must be one of {', '.join(TRAINED)}")
        if (self.rank is not None) != (self.trained == "lora") or (self.rank or 1) < 1:
            raise ValueError(f"rank={self.rank} belongs to 'lora', where it is at least 1")
        if not self.trains_weights and not self.codec_names:
            raise ValueError(
                f"the cache {self.spec.name!r} has no {self.trained} to train: "
                + (
                    f"its scores are {self.spec.scores}; train the decoders, or use a cache with "
                    "fitted scores"
                    if self.spec.sketch is not None
                    else "its keys are not sketched"
                )
            )

    @property
    def compressed(self) -> bool:
        """Whether attention reads what a compressed cache would give."""
        return not self.spec.exact

    @property
    def trains_weights(self) -> bool:
        """Whether the model's weights change, and not only arrays of the key codec."""
        return self.trained not in OF_CODEC

    @property
    def codec_names(self) -> tuple[str, ...]:
        """The arrays of the key codec that train, by the names of `CodecParameters`."""
        sketch = self.spec.sketch
        if sketch is None:
            return ()
        names = ["temperature", "offset"] if self.spec.scores == "fitted" else []
        if self.trained != "temperatures":
            # The rows of a transform code that share a component would not stay alike.
            names.append("transform" if isinstance(sketch, LinearCode) else "projection")
            if not isinstance(sketch, GaussianSigns):
                names.append("mean")
        return tuple(names)

    @property
    def has_rotations(self) -> bool:
        """Whether the projection that trains must remain orthogonal."""
        sketch = self.spec.sketch
        orthogonal = not isinstance(sketch, GaussianSigns | LinearCode)
        return orthogonal and "projection" in self.codec_names


@dataclass(frozen=True, eq=False)
class Origin:
    """The model that training begins from.

    Attributes:
        weights: what `decoder_parameters` lists, any floating dtype.
        codec: of the scope's cache; None where its keys have none.
        rotation: of its values, to be folded into the weights; None where there is none.
    """

    weights: Mapping[str, Array]
    codec: CodecParameters | None = None
    rotation: Float32[Array, "layers kv_heads head_dim head_dim"] | None = None


def trained_arrays(
    config: LlamaConfig, scope: Scope, origin: Origin, key: Key[Array, ""]
) -> dict[str, Float32[Array, "..."]]:
    """What changes, as it is before the first step.

    Args:
        config: the model's.
        scope: what trains.
        origin: the model to begin from; float32 weights are not copied, arrays of its codec are.
        key: of the changes of low rank, which begin as products with zero.
    """
    arrays: dict[str, Array] = {}
    if scope.trained == "everything":
        arrays |= {name: jnp.asarray(w, jnp.float32) for name, w in origin.weights.items()}
    if scope.rank is not None:
        matrices = list(_matrices(config))
        for (name, (inputs, outputs)), own in zip(
            matrices, jax.random.split(key, len(matrices)), strict=True
        ):
            layers, size = config.num_layers, prod(inputs)
            first = jax.random.normal(own, (layers, *inputs, scope.rank)) * size**-0.5
            arrays[f"{LORA}{name}{IN}"] = first
            arrays[f"{LORA}{name}{OUT}"] = jnp.zeros((layers, scope.rank, *outputs))
    codec = codec_arrays(origin.codec)
    return arrays | {f"{CODEC}{name}": jnp.array(codec[name]) for name in scope.codec_names}


def fixed_arrays(
    scope: Scope, origin: Origin, dtype: str, *, taught_by: Mapping[str, Array] | None = None
) -> dict[str, Array]:
    """What does not change.

    Args:
        scope: what trains.
        origin: the model to begin from.
        dtype: of the arithmetic, in which weights are kept.
        taught_by: weights of the teacher, which may be those of `origin`; None without one.
    """

    def kept(weights: Mapping[str, Array], prefix: str) -> dict[str, Array]:
        # Copies, because the first step consumes the arrays that train.
        narrow = narrowed(weights, dtype)
        return {prefix + name: jnp.array(array) for name, array in narrow.items()}

    arrays: dict[str, Array] = {}
    if scope.trained != "everything":
        arrays |= kept(origin.weights, "")
    if taught_by is not None and (not arrays or taught_by is not origin.weights):
        arrays |= kept(taught_by, TEACHER)
    arrays |= fixed_codec(scope, origin)
    return arrays if origin.rotation is None else arrays | {ROTATION: origin.rotation}


def fixed_codec(scope: Scope, origin: Origin) -> dict[str, Array]:
    """The arrays of the key codec that do not change."""
    arrays = codec_arrays(origin.codec)
    return {f"{CODEC}{name}": x for name, x in arrays.items() if name not in scope.codec_names}


def student(
    config: LlamaConfig,
    scope: Scope,
    trained: Mapping[str, Array],
    fixed: Mapping[str, Array],
    dtype: str,
) -> Decoder:
    """The decoder that is trained, as loading the exported model would give it."""
    weights = merged_weights(config, scope, trained, fixed)
    if ROTATION in fixed:
        weights = fold_value_rotation(config, weights, fixed[ROTATION])
    codec = merged_codec(trained, fixed)
    return Decoder(config, narrowed(weights, dtype), scope.spec, codec)


def teacher(config: LlamaConfig, fixed: Mapping[str, Array]) -> Decoder:
    """The model that is imitated, with exact attention."""

    def weight(name: str) -> Array:
        own = TEACHER + name
        return fixed[own] if own in fixed else fixed[name]

    return Decoder(config, {name: weight(name) for name in decoder_parameters(config)})


def merged_weights(
    config: LlamaConfig, scope: Scope, trained: Mapping[str, Array], fixed: Mapping[str, Array]
) -> dict[str, Array]:
    """The weights that a checkpoint of the student has."""
    weights = {
        name: trained[name] if name in trained else fixed[name]
        for name in decoder_parameters(config)
    }
    if scope.rank is None:
        return weights
    for name, (inputs, _) in _matrices(config):
        first, second = trained[f"{LORA}{name}{IN}"], trained[f"{LORA}{name}{OUT}"]
        layers = config.num_layers
        change = jnp.einsum(
            "lir,lro->lio",
            first.reshape(layers, prod(inputs), scope.rank),
            second.reshape(layers, scope.rank, -1),
        )
        weights[name] = weights[name].astype(jnp.float32) + change.reshape(weights[name].shape)
    return weights


def merged_codec(
    trained: Mapping[str, Array], fixed: Mapping[str, Array]
) -> CodecParameters | None:
    """The key codec of the student; None where keys have none."""
    arrays = {
        name.removeprefix(CODEC): array
        for name, array in {**fixed, **trained}.items()
        if name.startswith(CODEC)
    }
    return CodecParameters(**arrays) if arrays else None


def narrowed(weights: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """Weights for arithmetic in `dtype`: the layers' matrices and biases are cast to it.

    The others become float32: their gradients are sums over many tokens, which 16 bits would
    round away.
    """

    def cast(name: str, array: Array) -> Array:
        wide = name in ("embedding", "unembedding") or name.endswith("norm")
        return array.astype(jnp.float32 if wide else dtype)

    return {name: cast(name, array) for name, array in weights.items()}


def codec_arrays(codec: CodecParameters | None) -> dict[str, Array]:
    """The arrays of a key codec by name."""
    if codec is None:
        return {}
    return {name: param[...] for name, param in vars(codec).items() if isinstance(param, nnx.Param)}


def _matrices(
    config: LlamaConfig,
) -> Iterator[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The matrices of all layers, and the shapes of what they take and give."""
    for name, info in decoder_parameters(config).items():
        if info.stacked and len(info.shape) > 1 and not name.endswith("bias"):
            split = input_axes(info)
            yield name, (info.shape[:split], info.shape[split:])


def input_axes(info: ParameterInfo) -> int:
    """How many dimensions of a matrix are of what it takes."""
    return info.axes.index("embed") if info.axes[0] != "embed" else 1
