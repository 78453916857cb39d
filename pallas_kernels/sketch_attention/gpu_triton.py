"""Sketch attention for one query per row on NVIDIA GPUs since Ampere, by Triton.

Three kernels: one reads the queries by the transform, one attends, one combines. The second cuts
the tokens that a row sees into as many even parts as fill the device, so its work follows the
lengths given at run time; only shapes are compiled in. jax-triton launches the kernels and is
imported when they are first wanted.
"""

from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.sketch_attention.arguments import (
    BlockRope,
    PackedKeys,
    PackedValues,
    SketchQuery,
)
from pallas_kernels.sketch_attention.partial import Partial

HEAD_DIMS = (64, 96, 128, 256)
SKETCH_BITS = (64, 96, 128, 192, 256)
MAX_GROUPS = 16
MIN_PERIOD = 32


class Tiles(NamedTuple):
    """How `attend` cuts its work.

    Attributes:
        tokens: read at once by a program, which is one warp.
        stages: tiles on their way while one is computed.
        residents: programs that a multiprocessor holds at once.
    """

    tokens: int
    stages: int
    residents: int


TILES = MappingProxyType(
    {
        (False, 8, False): Tiles(64, 3, 12),
        (False, 8, True): Tiles(64, 3, 8),
        (False, 16, False): Tiles(64, 3, 8),
        (False, 16, True): Tiles(32, 3, 8),
        (True, 8, False): Tiles(64, 3, 12),
        (True, 8, True): Tiles(64, 3, 8),
        (True, 16, False): Tiles(64, 3, 8),
        (True, 16, True): Tiles(32, 3, 8),
    }
)
"""By whether the query is signed, query heads per KV head (up to so many), and whether values take
many registers: those of more than 128 channels, or whose words are spread twice."""

MIN_TILES_PER_SPLIT = 2
"""With fewer, starting a program and combining its result cost more than they bring."""

_A100_MULTIPROCESSORS = 108
_COMBINED_CHANNELS = 32
_COMBINED_SPLITS = 256


@dataclass(frozen=True)
class Launch:
    """A kernel and all that is static about its call.

    Attributes:
        kernel: its name in `gpu_triton_kernels`.
        outputs: shapes and dtypes of what it writes.
        grid: programs.
        warps: per program.
        stages: of its loops.
        constants: its compile-time arguments.
    """

    kernel: str
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    grid: tuple[int, ...]
    warps: int
    stages: int
    constants: dict[str, Any] = field(hash=False)


class Launches(NamedTuple):
    """The kernels of one call, in order."""

    encode: Launch
    attend: Launch
    combine: Launch


def refusal(query: SketchQuery, keys: PackedKeys, values: PackedValues) -> str | None:
    """Why the kernels cannot run these arguments; None where they can.

    Raises:
        ImportError: they could, but the packages they need are not there.
    """
    queries, heads, head_dim = query.vectors.shape[1:]
    kv_heads, _, bits = query.transform.shape
    reasons = []
    if queries != 1:
        reasons.append(f"it takes one query per row, got {queries}")
    if head_dim not in HEAD_DIMS:
        reasons.append(f"it takes a head dimension of {_any_of(HEAD_DIMS)}, got {head_dim}")
    if bits not in SKETCH_BITS:
        reasons.append(f"it takes sketches of {_any_of(SKETCH_BITS)} bits, got {bits}")
    if heads > MAX_GROUPS * kv_heads:
        reasons.append(
            f"it takes at most {MAX_GROUPS} query heads per KV head, got {heads // kv_heads}"
        )
    if query.rope is not None and query.rope.period < MIN_PERIOD:
        reasons.append(f"it takes a RoPE period of at least {MIN_PERIOD}, got {query.rope.period}")
    if reasons:
        return "; ".join(reasons)
    _packages()
    return None


def sketch_attention(
    query: SketchQuery,
    keys: PackedKeys,
    values: PackedValues,
    layer: Int32[Array, ""],
    *,
    start: int,
    stop: Int32[Array, "batch queries"],
) -> Partial:
    """See `pallas_kernels.sketch_attention.sketch_attention`.

    Raises:
        ImportError: a package is missing, see `refusal`.
    """
    launches = plan(query, keys, values, start=start, multiprocessors=_multiprocessors())
    capacity = keys.words.shape[-1]
    coefficients, lines = _call(launches.encode, *_encoder_arguments(query, capacity))
    # Arrays that a kernel has no use for still need something in their place.
    outputs, statistics = _call(
        launches.attend,
        keys.words,
        keys.words if keys.scales is None else keys.scales,
        values.words,
        values.affine,
        coefficients,
        lines,
        lines if query.variance is None else query.variance.astype(jnp.float32),
        jnp.asarray(layer, jnp.int32),
        stop,
    )
    return Partial(*_call(launches.combine, outputs, statistics))


def plan(
    query: SketchQuery,
    keys: PackedKeys,
    values: PackedValues,
    *,
    start: int,
    multiprocessors: int,
) -> Launches:
    """Tiles, splits, workspaces and constants of a call; shapes alone matter.

    Args:
        query: the queries.
        keys: the sketches.
        values: the value codes.
        start: the first token that may be seen.
        multiprocessors: of the device.
    """
    batch, _, heads, head_dim = query.vectors.shape
    kv_heads, _, bits = query.transform.shape
    capacity = keys.words.shape[-1]
    cells, groups = batch * kv_heads, heads // kv_heads
    large = head_dim > 128 or values.bits < 4
    tiles = TILES[query.signed, 8 if groups <= 8 else 16, large]
    blocks = 1
    if query.rope is not None:
        tiles = tiles._replace(tokens=min(tiles.tokens, query.rope.period))
        blocks = capacity // query.rope.period
    wanted = multiprocessors * tiles.residents // cells
    splits = max(1, min(wanted, capacity // (tiles.tokens * MIN_TILES_PER_SPLIT)))
    common = {"GROUPS": groups, "DIM": head_dim}

    rows = batch * blocks * groups
    rows_at_once = 16 if query.rope is None else 32
    encode = Launch(
        "encode_queries",
        (
            _array((cells, blocks * groups, bits // 32), jnp.int32)
            if query.signed
            else _array((cells, blocks * groups, bits), jnp.float16),
            _array((cells, blocks * groups, 3), jnp.float32),
        ),
        grid=(-(-rows // rows_at_once), kv_heads),
        warps=8,
        stages=4 if bits <= 128 else 3,
        constants=common
        | {
            "BATCH": batch,
            "KV_HEADS": kv_heads,
            "BLOCKS": blocks,
            "BITS": bits,
            "ROPE": query.rope is not None,
            "SIGNED": query.signed,
            "PRECISION": _precision(query),
            "ROWS": rows_at_once,
            "COLUMNS": _power_of_two(bits),
            "DEPTH": 16,
        },
    )
    attend = Launch(
        "attend",
        (
            _array((cells, splits, groups, head_dim), jnp.float32),
            _array((cells, splits, groups, 2), jnp.float32),
        ),
        grid=(splits, cells),
        warps=1,
        stages=tiles.stages,
        constants=common
        | {
            "BATCH": batch,
            "KV_HEADS": kv_heads,
            "CAPACITY": capacity,
            "BITS": bits,
            "VALUE_BITS": values.bits,
            "SCALED": keys.scales is not None,
            "SIGNED": query.signed,
            "CODE_PLANES": 0 if query.variance is None else query.planes,
            "PERIOD": 0 if query.rope is None else query.rope.period,
            "START": start,
            "TILE": tiles.tokens,
            "COLUMNS": _power_of_two(groups),
            "KEY_BYTES": max(16, _power_of_two(bits // 8)),
            "VALUE_ROWS": _power_of_two(head_dim // (8 if values.bits == 4 else 16)),
        },
    )
    combine = Launch(
        "combine",
        (
            _array((batch, 1, heads, head_dim), jnp.float32),
            _array((batch, 1, heads), jnp.float32),
        ),
        grid=(batch * heads, head_dim // _COMBINED_CHANNELS),
        warps=4,
        stages=2,
        constants=common
        | {
            "VALUE_BITS": values.bits,
            "SPLITS": splits,
            "CHUNK": min(_COMBINED_SPLITS, _power_of_two(splits)),
            "CHANNELS": _COMBINED_CHANNELS,
        },
    )
    return Launches(encode, attend, combine)


def _encoder_arguments(query: SketchQuery, capacity: int) -> tuple[Array, ...]:
    scale = jnp.asarray(query.scale)
    if query.rope is None:
        cos = sin = mean = scale
    else:
        cos, sin = _turns(query.rope, capacity)
        mean = query.rope.mean / query.vectors.shape[-1] ** 0.5
    return query.vectors, query.transform, scale, cos, sin, mean


def _turns(
    rope: BlockRope, capacity: int
) -> tuple[Float[Array, "blocks half_dim"], Float[Array, "blocks half_dim"]]:
    """Cosine and sine of the angles by which each block's queries are turned back."""
    begin = jnp.arange(0, capacity, rope.period, dtype=jnp.float32)
    angle = -begin[:, None] * rope.frequencies
    return jnp.cos(angle), jnp.sin(angle)


def _precision(query: SketchQuery) -> str:
    """How precisely queries are read by the transform."""
    # tf32 has the mantissa of the float16s that readings become, and a finite RoPE period has many
    # to take. Signs of readings near zero need more.
    return "tf32x3" if query.signed or query.rope is None else "tf32"


def _call(launch: Launch, *arguments: Array) -> tuple[Array, ...]:
    jax_triton, kernels = _packages()
    return jax_triton.triton_call(
        *arguments,
        kernel=getattr(kernels, launch.kernel),
        out_shape=launch.outputs,
        grid=launch.grid,
        num_warps=launch.warps,
        num_stages=launch.stages,
        **launch.constants,
    )


def _packages() -> tuple[ModuleType, ModuleType]:
    """jax-triton and the kernels, which need Triton."""
    try:
        import jax_triton

        from pallas_kernels.sketch_attention import gpu_triton_kernels
    except ImportError as error:
        raise ImportError(
            f"sketch attention by Triton needs packages that are not there ({error}); "
            'install them with: pip install "h1bjax[triton]"'
        ) from error
    return jax_triton, gpu_triton_kernels


def _multiprocessors() -> int:
    count = getattr(jax.devices()[0], "core_count", None)
    # A machine without a GPU can still lower for one.
    return int(count) if jax.default_backend() == "gpu" and count else _A100_MULTIPROCESSORS


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _power_of_two(n: int) -> int:
    """The least power of two that is not below `n`."""
    return 1 << (n - 1).bit_length()


def _any_of(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
