"""Key codecs: how a key becomes sign bits, and how a query reads them.

A key is stored as signs `c ∈ {±1}^b`, sometimes with one scalar `s`, and read as
`k ≈ μ + s·A c`. Every codec here is a choice of the encoder and of the linear decoder `A`, so
attention scores a key by one dot of signs: `s·(Aᵀq)·c/√D`. The parameters of a codec (`μ`, the
projection and, where it is not the projection's transpose, `A`) belong to a layer's KV head and
live in `CodecParameters`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil, pi
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from h1bjax.cache.fitting.rotation import iterative_quantisation
from h1bjax.cache.fitting.sample import KeySample
from h1bjax.cache.fitting.transform_coding import DEEPEST, fit_linear_code
from pallas_kernels.append import KeyEncoder, encode_keys

_WORD_BITS = 32
_EXACT = jax.lax.Precision.HIGHEST


class EncodedKeys(NamedTuple):
    """Sketched keys before packing.

    Attributes:
        bits: True is +1.
        scale: bf16, the scalar of each key; None for codecs without one.
    """

    bits: Bool[Array, "*tokens kv_heads bits"]
    scale: Float[Array, "*tokens kv_heads"] | None

    @property
    def signs(self) -> Float[Array, "*tokens kv_heads bits"]:
        """The sketch as float32 ±1."""
        return jnp.where(self.bits, 1.0, -1.0)


class CodecParameters(nnx.Module):
    """What the key codec of every layer knows, float32, stacked over layers.

    Attributes:
        projection: `u = projection @ (k - mean)`.
        mean: the mean key μ, of block-relative keys where the RoPE period is finite.
        temperature: τ of each query head, a factor on sketched logits (fitted scores only).
        offset: δ of each query head, added to sketched logits (fitted scores only).
        transform: the decoder `A`, for codecs whose decoder is not derived from the projection.
        levels: half the number of quantiser levels behind each bit (`LinearCode` only).
        weight: the place value of each bit in its level (`LinearCode` only).
        metric: symmetric; how much each direction of a key matters to queries, in which the
            scalar is computed (`LinearCode` with a scalar only).
    """

    def __init__(
        self,
        projection: Float[Array, "layers kv_heads components head_dim"],
        mean: Float[Array, "layers kv_heads head_dim"],
        temperature: Float[Array, "layers heads"],
        offset: Float[Array, "layers heads"],
        transform: Float[Array, "layers kv_heads head_dim bits"] | None = None,
        levels: Float[Array, "layers kv_heads bits"] | None = None,
        weight: Float[Array, "layers kv_heads bits"] | None = None,
        metric: Float[Array, "layers kv_heads head_dim head_dim"] | None = None,
    ):
        self.projection = nnx.Param(projection)
        self.mean = nnx.Param(mean)
        self.temperature = nnx.Param(temperature)
        self.offset = nnx.Param(offset)
        self.transform = None if transform is None else nnx.Param(transform)
        self.levels = None if levels is None else nnx.Param(levels)
        self.weight = None if weight is None else nnx.Param(weight)
        self.metric = None if metric is None else nnx.Param(metric)

    def with_scores(
        self, temperature: Float[Array, "*layers heads"], offset: Float[Array, "*layers heads"]
    ) -> "CodecParameters":
        """The same codec with another temperature and offset."""

        def unchanged(param: nnx.Param | None) -> Array | None:
            return None if param is None else param[...]

        return CodecParameters(
            self.projection[...],
            self.mean[...],
            temperature,
            offset,
            transform=unchanged(self.transform),
            levels=unchanged(self.levels),
            weight=unchanged(self.weight),
            metric=unchanged(self.metric),
        )


@dataclass(frozen=True)
class KeyCodec(ABC):
    """What the cache asks of a sketching key codec. `parameters` are those of one layer."""

    signed_query: ClassVar[bool] = False
    """Whether queries are reduced to signs too."""
    planes: ClassVar[int] = 1
    """How many bits hold one component, see `SketchQuery.planes`."""
    data_free: ClassVar[bool] = True
    """Whether the parameters of `init` are of use before calibration."""

    @property
    def scaled(self) -> bool:
        """Whether a bf16 scalar is stored with each key."""
        return True

    @abstractmethod
    def sketch_bits(self, head_dim: int) -> int:
        """Sign bits per key, a multiple of 32.

        Raises:
            ValueError: the width does not pack into 32-bit words.
        """

    @abstractmethod
    def init(
        self, rng: Key[Array, ""], layers: int, kv_heads: int, heads: int, head_dim: int
    ) -> CodecParameters:
        """Parameters that need no data: a seeded random projection, no mean, τ = 1, δ = 0."""

    @abstractmethod
    def fit(self, rng: Key[Array, ""], sample: KeySample, heads: int) -> CodecParameters:
        """Parameters of one layer, without a layers axis, fitted to a sample of it; τ = 1, δ = 0.

        Args:
            rng: of whatever the fit begins with.
            sample: the layer's.
            heads: query heads.
        """

    def encoder(self, parameters: CodecParameters) -> KeyEncoder:
        """How keys become bits and a scalar; `parameters` may be those of all layers."""
        return KeyEncoder(parameters.projection[...], parameters.mean[...], scaled=self.scaled)

    def encode(
        self, parameters: CodecParameters, keys: Float[Array, "*tokens kv_heads head_dim"]
    ) -> EncodedKeys:
        """Sketches keys, in float32."""
        return EncodedKeys(*encode_keys(self.encoder(parameters), keys))

    def query_transform(
        self, parameters: CodecParameters
    ) -> Float[Array, "kv_heads head_dim bits"]:
        """`A`, by which queries are transformed; here the projection's transpose."""
        return jnp.swapaxes(parameters.projection[...], -1, -2)

    def logit_scale(self, head_dim: int) -> float:
        """The factor from `s·(Aᵀq)·c` to a logit, before any temperature; here 1/√D."""
        return head_dim**-0.5

    def noise(self, head_dim: int) -> tuple[float, int] | None:
        """`(κ, d)`: the error of a raw logit has variance `κ·‖q‖²·‖k - μ‖²/(D·d)`.

        For `b ≥ D` the error of the code `s·c - u` has energy `κ·‖u‖²`, spread evenly over the
        `d` directions orthogonal to u. None for codecs that have no variance correction.
        """
        return None


@dataclass(frozen=True)
class GaussianSigns(KeyCodec):
    """The sketch of H1B-KV as published (arXiv 2510.05529).

    `c = sign(R k)` with R Gaussian, no mean and no scalar; the query is signed too, so a score is
    `τ·(1 - 2·popcount(c(q) xor c(k))/b)`, here with `τ = √D` times the fitted temperature.
    """

    bits: int = 256
    signed_query: ClassVar[bool] = True

    @property
    def scaled(self) -> bool:
        return False

    def sketch_bits(self, head_dim: int) -> int:
        return _packable(self.bits)

    def init(
        self, rng: Key[Array, ""], layers: int, kv_heads: int, heads: int, head_dim: int
    ) -> CodecParameters:
        shape = (layers, kv_heads, self.sketch_bits(head_dim), head_dim)
        return _uncalibrated(jax.random.normal(rng, shape), heads)

    def fit(self, rng: Key[Array, ""], sample: KeySample, heads: int) -> CodecParameters:
        """Those of `init`: as published, only the temperature depends on data."""
        kv_heads, _, head_dim = sample.keys.shape
        return _first_layer(self.init(rng, 1, kv_heads, heads, head_dim))

    def logit_scale(self, head_dim: int) -> float:
        return head_dim**0.5 / self.sketch_bits(head_dim)


@dataclass(frozen=True)
class OrthogonalSigns(KeyCodec):
    """One sign per direction of an orthogonal basis, and a scalar.

    `u = R(k - μ)`, `c = sign u`, `A = Rᵀ` and `s = ‖k - μ‖²/(u·c)`, 0 where u is 0: the decoded
    key has the exact component along the key itself (RaBitQ, arXiv 2405.12497). R has orthonormal
    columns where `b ≥ D` and orthonormal rows where `b < D`.

    Attributes:
        bits: b; by default the head dimension rounded up to a multiple of 32.
    """

    bits: int | None = None

    def sketch_bits(self, head_dim: int) -> int:
        return _round_up(head_dim, _WORD_BITS) if self.bits is None else _packable(self.bits)

    def init(
        self, rng: Key[Array, ""], layers: int, kv_heads: int, heads: int, head_dim: int
    ) -> CodecParameters:
        components = self.sketch_bits(head_dim)
        return _uncalibrated(_orthogonal(rng, layers, kv_heads, components, head_dim), heads)

    def fit(self, rng: Key[Array, ""], sample: KeySample, heads: int) -> CodecParameters:
        """Centres keys and fits the rotation by iterative quantisation."""
        components = self.sketch_bits(sample.keys.shape[-1])
        return _fit_rotation(rng, sample, heads, components, _signs)

    def noise(self, head_dim: int) -> tuple[float, int] | None:
        # For Gaussian components E|u| = √(2/π)·√E[u²], so ‖s·c‖² is π/2 of ‖u‖²; fewer bits than
        # channels leave the rest of the key to the error as well.
        bits = self.sketch_bits(head_dim)
        return pi / 2 * max(1.0, head_dim / bits) - 1, max(bits, head_dim) - 1


@dataclass(frozen=True)
class TwoPlanes(KeyCodec):
    """A sign and a magnitude bit per direction, and a scalar.

    With `u = R(k - μ)` a component's code is ±3 where `|u_i| > 0.98·‖u‖/√C`, else ±1 (nearly the
    best four levels for a Gaussian), written `2a + a'` with signs a and a'. The sketch is all a,
    then all a'; `A = [2Rᵀ, Rᵀ]`; the scalar is that of `OrthogonalSigns` for the code.
    """

    planes: ClassVar[int] = 2
    threshold: ClassVar[float] = 0.98

    def sketch_bits(self, head_dim: int) -> int:
        return 2 * _round_up(head_dim, _WORD_BITS // 2)

    def init(
        self, rng: Key[Array, ""], layers: int, kv_heads: int, heads: int, head_dim: int
    ) -> CodecParameters:
        components = self.sketch_bits(head_dim) // 2
        return _uncalibrated(_orthogonal(rng, layers, kv_heads, components, head_dim), heads)

    def fit(self, rng: Key[Array, ""], sample: KeySample, heads: int) -> CodecParameters:
        """Centres keys and fits the rotation by iterative quantisation."""
        components = self.sketch_bits(sample.keys.shape[-1]) // 2

        def code(u: Float[Array, "samples components"]) -> Float[Array, "samples components"]:
            return jnp.where(self._large(u), 3.0, 1.0) * _signs(u)

        return _fit_rotation(rng, sample, heads, components, code)

    def encoder(self, parameters: CodecParameters) -> KeyEncoder:
        return replace(super().encoder(parameters), magnitude=self.threshold)

    def query_transform(
        self, parameters: CodecParameters
    ) -> Float[Array, "kv_heads head_dim bits"]:
        decoder = jnp.swapaxes(parameters.projection[...], -1, -2)
        return jnp.concatenate([2.0 * decoder, decoder], axis=-1)

    def noise(self, head_dim: int) -> tuple[float, int] | None:
        return 0.132, self.sketch_bits(head_dim) // 2 - 1

    def _large(self, u: Float[Array, "*vectors components"]) -> Bool[Array, "*vectors components"]:
        typical = jnp.sqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True))
        return jnp.abs(u) > self.threshold * typical


@dataclass(frozen=True)
class LinearCode(KeyCodec):
    """The general form: uniform quantisers of any width behind the bits, and any linear decoder.

    Bit j looks at one coordinate `x_j = projection_j·(k - μ)` in units of its quantiser step,
    quantised to `level_j = clip(⌊x_j⌋ + levels_j, 0, 2·levels_j - 1)`, and is the binary digit of
    that level with place value `weight_j`. A plain sign has `levels = weight = 1`. Transform
    coding gives a component with n bits n rows that share their projection, have
    `levels = 2ⁿ⁻¹` and weights 1, 2, … 2ⁿ⁻¹, and decoder columns `weight_j·step/2·basis`.

    The parameters describe keys as they are, so they come from calibration; `init` gives a valid
    but untuned start for keys of unit variance.

    With `scaled`, the decoded key is stretched by `s = ‖y‖²/(y·ŷ)`, where y and ŷ are
    `metric (k - μ)` before and after coding, so that like a RaBitQ sketch it has the exact
    component along the key itself. Without, decoded keys are as near as possible to the true
    ones and therefore too short, which costs retrieval far more than it saves elsewhere.

    Attributes:
        rate: bits per channel of the head; their number is rounded up to a multiple of 32.
        scaled: whether a bf16 scalar is stored with each key.
    """

    rate: float = 1.0
    scaled: bool = True
    data_free: ClassVar[bool] = False
    longest: ClassVar[float] = 3.0
    """The most that a key is stretched: one that its code hardly describes stays short."""

    def sketch_bits(self, head_dim: int) -> int:
        if not 0 < self.rate <= DEEPEST:
            raise ValueError(f"rate={self.rate} bits per channel must be in (0, {DEEPEST}]")
        # A rate that was itself a quotient may miss the bits it stands for by a rounding error.
        return _round_up(ceil(round(self.rate * head_dim, 6)), _WORD_BITS)

    def init(
        self, rng: Key[Array, ""], layers: int, kv_heads: int, heads: int, head_dim: int
    ) -> CodecParameters:
        """Spreads the bits evenly over a random basis, with steps that cover ±2 per component."""
        bits = self.sketch_bits(head_dim)
        basis = _orthogonal(rng, layers, kv_heads, head_dim, head_dim)
        bit = jnp.arange(bits)
        component, place = bit % head_dim, bit // head_dim
        depth = bits // head_dim + (component < bits % head_dim)
        step = 4.0 / 2.0**depth
        weight = 2.0**place
        rows = basis[:, :, component]
        parameters = _uncalibrated(rows / step[:, None], heads)
        stacked = (layers, kv_heads, bits)
        return CodecParameters(
            parameters.projection[...],
            parameters.mean[...],
            parameters.temperature[...],
            parameters.offset[...],
            transform=jnp.swapaxes(rows * (weight * step / 2)[:, None], -1, -2),
            levels=jnp.broadcast_to(2.0 ** (depth - 1), stacked),
            weight=jnp.broadcast_to(weight, stacked),
            metric=jnp.broadcast_to(jnp.eye(head_dim), (layers, kv_heads, head_dim, head_dim))
            if self.scaled
            else None,
        )

    def fit(self, rng: Key[Array, ""], sample: KeySample, heads: int) -> CodecParameters:
        """Centres keys and fits a transform code, see `fit_linear_code`."""
        bits = self.sketch_bits(sample.keys.shape[-1])
        mean, centred = _centre(sample.keys)
        fitted = jax.vmap(partial(fit_linear_code, bits=bits))(centred, sample.query_moment)
        return CodecParameters(
            fitted.projection,
            mean,
            temperature=jnp.ones(heads),
            offset=jnp.zeros(heads),
            transform=fitted.transform,
            levels=fitted.levels,
            weight=fitted.weight,
            metric=fitted.metric if self.scaled else None,
        )

    def encoder(self, parameters: CodecParameters) -> KeyEncoder:
        assert parameters.levels is not None and parameters.weight is not None
        quantiser = replace(
            super().encoder(parameters),
            levels=parameters.levels[...],
            weight=parameters.weight[...],
            longest=self.longest,
        )
        if parameters.metric is None:
            return quantiser
        metric, transform = parameters.metric[...], self.query_transform(parameters)
        seen = jnp.einsum("...ed,...db->...eb", metric, transform, precision=_EXACT)
        reading = jnp.einsum("...eb,...ed->...bd", seen, metric, precision=_EXACT)
        return replace(quantiser, reading=reading, metric=metric)

    def query_transform(
        self, parameters: CodecParameters
    ) -> Float[Array, "kv_heads head_dim bits"]:
        assert parameters.transform is not None
        return parameters.transform[...]


def _packable(bits: int) -> int:
    if bits <= 0 or bits % _WORD_BITS:
        raise ValueError(
            f"a sketch of {bits} bits does not pack into 32-bit words; use a multiple of 32"
        )
    return bits


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _orthogonal(
    rng: Key[Array, ""], layers: int, kv_heads: int, components: int, head_dim: int
) -> Float[Array, "layers kv_heads components head_dim"]:
    tall, narrow = max(components, head_dim), min(components, head_dim)
    q, r = jnp.linalg.qr(jax.random.normal(rng, (layers, kv_heads, tall, narrow)))
    # QR leaves the signs of R's diagonal open; fixing them makes the draw uniform.
    q = q * jnp.where(jnp.diagonal(r, axis1=-2, axis2=-1) < 0, -1.0, 1.0)[..., None, :]
    return q if components >= head_dim else jnp.swapaxes(q, -1, -2)


def _uncalibrated(
    projection: Float[Array, "layers kv_heads components head_dim"], heads: int
) -> CodecParameters:
    layers, kv_heads, _, head_dim = projection.shape
    return CodecParameters(
        projection,
        mean=jnp.zeros((layers, kv_heads, head_dim)),
        temperature=jnp.ones((layers, heads)),
        offset=jnp.zeros((layers, heads)),
    )


def _first_layer(parameters: CodecParameters) -> CodecParameters:
    return jax.tree.map(lambda array: array[0], parameters)


def _signs(u: Float[Array, "*vectors components"]) -> Float[Array, "*vectors components"]:
    return jnp.where(u >= 0, 1.0, -1.0)


def _centre(
    keys: Float[Array, "kv_heads samples head_dim"],
) -> tuple[Float[Array, "kv_heads head_dim"], Float[Array, "kv_heads samples head_dim"]]:
    mean = jnp.mean(keys, axis=1)
    return mean, keys - mean[:, None]


def _fit_rotation(
    rng: Key[Array, ""],
    sample: KeySample,
    heads: int,
    components: int,
    code: Callable[[Float[Array, "samples components"]], Float[Array, "samples components"]],
) -> CodecParameters:
    mean, centred = _centre(sample.keys)
    rngs = jax.random.split(rng, len(mean))
    rotation = jax.vmap(partial(iterative_quantisation, components=components, code=code))(
        rngs, centred
    )
    return CodecParameters(rotation, mean, temperature=jnp.ones(heads), offset=jnp.zeros(heads))
