"""From a spec and a layer's parameters to sketches and to the queries that score them."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int32

from h1bjax.cache.keys import CodecParameters, EncodedKeys, KeyCodec
from h1bjax.cache.spec import CacheSpec
from pallas_kernels.rotary import rotate
from pallas_kernels.sketch_attention import BlockRope, SketchQuery


def encode_keys(
    spec: CacheSpec,
    codec: KeyCodec,
    parameters: CodecParameters,
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    frequencies: Float[Array, "half_dim"],
) -> EncodedKeys:
    """Sketches keys that have their full RoPE, relative to their block if the period is finite."""
    if spec.rope_period is not None:
        keys = relative_keys(keys, positions, spec.rope_period, frequencies)
    return codec.encode(parameters, keys)


def relative_keys(
    keys: Float[Array, "batch tokens kv_heads head_dim"],
    positions: Int32[Array, "batch tokens"],
    period: int,
    frequencies: Float[Array, "half_dim"],
) -> Float[Array, "batch tokens kv_heads head_dim"]:
    """Keys that have their full RoPE, with RoPE for their offset in a block of `period` tokens."""
    block = positions - positions % period
    return rotate(keys.astype(jnp.float32), -block[..., None], frequencies)


def sketch_query(
    spec: CacheSpec,
    codec: KeyCodec,
    parameters: CodecParameters,
    query: Float[Array, "batch queries heads head_dim"],
    frequencies: Float[Array, "half_dim"],
) -> tuple[SketchQuery, Float[Array, "batch queries heads"]]:
    """How queries score the sketched keys, and what to add to all sketched logits of each query.

    The addition joins the offset δ and, for an infinite RoPE period, the part `q·μ/√D` that
    every key shares, so that sketched logits are comparable with exact ones.
    """
    head_dim = query.shape[-1]
    fitted = spec.scores == "fitted"
    # Known while compiling, so that it need not be an array on the device.
    temperature = parameters.temperature[...] if fitted else np.ones(query.shape[2], np.float32)
    shift = parameters.offset[...] if fitted else jnp.zeros(query.shape[2])
    shift = jnp.broadcast_to(shift, query.shape[:3])
    vectors = query.astype(jnp.float32)
    mean = parameters.mean[...]
    if spec.rope_period is None:
        grouped = rearrange(vectors, "b q (k g) d -> b q k g d", k=mean.shape[0])
        common = jnp.einsum("bqkgd,kd->bqkg", grouped, mean, precision=jax.lax.Precision.HIGHEST)
        shift = shift + common.reshape(shift.shape) / head_dim**0.5
        rope = None
    else:
        rope = BlockRope(frequencies, mean, spec.rope_period)
    return (
        SketchQuery(
            vectors,
            codec.query_transform(parameters),
            temperature * np.float32(codec.logit_scale(head_dim)),
            variance=half_variance(spec, codec, vectors),
            rope=rope,
            signed=codec.signed_query,
            planes=codec.planes,
        ),
        shift,
    )


def half_variance(
    spec: CacheSpec, codec: KeyCodec, query: Float[Array, "batch queries heads head_dim"]
) -> Float[Array, "batch queries heads"] | None:
    """½·κ·‖q‖²/(D·d·(1 + κ)), which times `s²‖code‖² ≈ (1 + κ)·‖k - μ‖²` is half the variance."""
    noise = codec.noise(query.shape[-1])
    if spec.scores != "corrected" or noise is None:
        return None
    kappa, directions = noise
    energy = jnp.sum(jnp.square(query.astype(jnp.float32)), axis=-1)
    return 0.5 * kappa / (1 + kappa) * energy / (query.shape[-1] * directions)


def squared_code_norm(
    signs: Float[Array, "batch tokens kv_heads bits"], codec: KeyCodec
) -> Float[Array, "batch tokens kv_heads"]:
    """`‖code‖²` of keys from the signs of their sketches, see `SketchQuery.planes`."""
    code = signs
    if codec.planes == 2:
        sign, second = jnp.split(signs, 2, axis=-1)
        code = 2.0 * sign + second
    return jnp.sum(jnp.square(code), axis=-1)


def sign_features(
    query: Float[Array, "batch tokens heads head_dim"],
    projection: Float[Array, "kv_heads head_dim bits"],
) -> Float[Array, "batch tokens heads bits"]:
    """What signed queries multiply sketches with: the signs of the projected query."""
    grouped = rearrange(
        query.astype(jnp.float32), "b t (k g) d -> b t k g d", k=projection.shape[0]
    )
    u = jnp.einsum("btkgd,kdc->btkgc", grouped, projection, precision=jax.lax.Precision.HIGHEST)
    return rearrange(jnp.where(u >= 0, 1.0, -1.0), "b t k g c -> b t (k g) c")
