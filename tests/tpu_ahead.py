"""Compiling for TPUs on a machine that has none, through libtpu."""

import math
import os
import re
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from h1bjax.cache import CacheSpec, KVCache
from h1bjax.cache.sharded import cache_specs
from h1bjax.config import LlamaConfig
from h1bjax.decoder import Decoder, init_codec
from h1bjax.parameters import decoder_parameters
from h1bjax.sharding import make_mesh, parameter_sharding

# Read when libtpu is loaded: it would look for a TPU, and allow one process only.
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
GENERATIONS = {"v5e": 5, "v5p": 5, "v6e": 6}
SHORT_NAMES = {"int32": "s32", "uint16": "u16"}


def mesh_of(chip: str, sizes: str = "batch=1", topology: str | None = None) -> Mesh:
    """The first chips of a slice, as `make_mesh` arranges them.

    Args:
        chip: its generation.
        sizes: of the mesh.
        topology: of the slice; by default of four chips.
    """
    pytest.importorskip("libtpu")
    named = CHIPS[chip] if topology is None else f"{chip}:{topology}"
    devices = topologies.get_topology_desc(named, platform="tpu").devices
    count = math.prod(int(size) for size in re.findall(r"\d+", sizes))
    return make_mesh(sizes, devices[:count])


def spread(mesh: Mesh, tree: Any) -> Any:
    """Shapes of a tree's arrays, each whole on every chip."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere), tree
    )


def lower(mesh: Mesh, function: Any, *arguments: Any) -> jax.stages.Lowered:
    """Lowers a jitted function for the chips of a mesh."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function.trace(*arguments).lower(lowering_platforms=("tpu",))


class Step(NamedTuple):
    """A compiled decode step, and the shapes of its arguments where they lie."""

    compiled: jax.stages.Compiled
    decoder: Decoder
    tokens: jax.ShapeDtypeStruct
    cache: KVCache


def compile_step(
    mesh: Mesh, config: LlamaConfig, spec: CacheSpec, *, batch: int, max_length: int
) -> Step:
    """A greedy decode step of a bf16 model, divided over a mesh as `h1bjax.load` divides it."""
    decoder = _decoder_on(mesh, config, spec)
    shapes = jax.eval_shape(
        partial(
            KVCache.init,
            config,
            spec,
            batch=batch,
            max_length=max_length,
            sequence_shards=mesh.shape["sequence"],
        )
    )
    cache = jax.tree.map(
        lambda array, part: jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=NamedSharding(mesh, part)
        ),
        shapes,
        cache_specs(shapes),
    )
    rows = NamedSharding(mesh, PartitionSpec("batch"))
    tokens = jax.ShapeDtypeStruct((batch, 1), jnp.int32, sharding=rows)

    def step(decoder: Decoder, tokens: Any, cache: KVCache) -> tuple:
        logits, updated = decoder(tokens, cache.lengths[:, None], cache)
        return jnp.argmax(logits[:, -1], axis=-1)[:, None].astype(jnp.int32), updated

    placed = jax.tree.map(lambda leaf: leaf.sharding, (tokens, cache))
    jitted = jax.jit(step, donate_argnames="cache", out_shardings=placed)
    return Step(lower(mesh, jitted, decoder, tokens, cache).compile(), decoder, tokens, cache)


def _decoder_on(mesh: Mesh, config: LlamaConfig, spec: CacheSpec) -> Decoder:
    table, rule = decoder_parameters(config), parameter_sharding(mesh, config)

    def build() -> Decoder:
        parameters = {
            name: jnp.zeros(
                (*([config.num_layers] if info.stacked else []), *info.shape), jnp.bfloat16
            )
            for name, info in table.items()
        }
        return Decoder(config, parameters, spec, init_codec(config, spec, jax.random.key(0)))

    def place(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        # A parameter's name comes before that of its array, which is "value" too.
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        where: jax.sharding.Sharding
        if "codec" in names:
            where = NamedSharding(mesh, PartitionSpec(None, "tensor"))
        else:
            info = next(table[name] for name in names if name in table)
            where = rule((None, *info.axes) if info.stacked else info.axes)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    decoder = jax.tree_util.tree_map_with_path(place, jax.eval_shape(build))
    decoder.mesh = mesh
    return decoder


def assert_in_place(
    compiled: jax.stages.Compiled, cache: Any, others: Any, *, written: bool
) -> None:
    """The cache takes its own bytes and is copied nowhere.

    Args:
        compiled: a program with these arguments and no others.
        cache: large enough not to fit into a chip's vector memory.
        others: all other arguments.
        written: whether the program donates the cache and returns it changed.
    """
    memory = compiled.memory_analysis()
    assert memory is not None
    size, rest = stored_bytes(cache), stored_bytes(others)
    assert memory.alias_size_in_bytes == (size if written else 0)
    # Other arguments, small or transposed, may be padded.
    assert size <= memory.argument_size_in_bytes <= size + 1.05 * rest + 2**20
    assert memory.temp_size_in_bytes < 0.01 * size
    assert memory.peak_memory_in_bytes < 1.02 * memory.argument_size_in_bytes
    assert copies(compiled, cache) == []


def stored_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one chip; vectors are stored in multiples of 128 numbers."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        count = int(np.prod(shape))
        total += (count if len(shape) > 1 else -(-count // 128) * 128) * leaf.dtype.itemsize
    return total


def copies(compiled: jax.stages.Compiled, cache: Any) -> list[str]:
    """Instructions of the program that copy or lay out anew a whole array of the cache."""
    shapes = {
        f"{SHORT_NAMES[leaf.dtype.name]}[{','.join(map(str, sorted(shape)))}]"
        for leaf in jax.tree.leaves(cache)
        if len(shape := leaf.sharding.shard_shape(leaf.shape)) > 1
    }
    pattern = re.compile(r"= (\w+)\[([\d,]+)\]\S* (copy|copy-start|transpose|reshape)\(")
    return [
        line.strip()
        for line in (compiled.as_text() or "").splitlines()
        if (found := pattern.search(line))
        and f"{found[1]}[{','.join(map(str, sorted(map(int, found[2].split(',')))))}]" in shapes
    ]
