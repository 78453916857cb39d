"""The decoder's parameters: one table of names, shapes, logical axes and checkpoint tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TypeVar

import jax
import numpy as np

from h1bjax.config import LlamaConfig

AnyArray = TypeVar("AnyArray", np.ndarray, jax.Array)

EMBED = (("embed",),)
HEAD_DIM = (("head_dim",),)


@dataclass(frozen=True)
class ParameterInfo:
    """One parameter of the decoder, and the checkpoint tensor that holds it.

    A linear layer is stored in a checkpoint as one `[out, in]` matrix, heads merged with their
    width. `hf_axes` spells that tensor in our axes, one group per dimension of the tensor: the
    query matrix `[H*D, E]` is `(("heads", "head_dim"), ("embed",))`. Splitting the groups and
    reordering the axes is all that separates the two forms.

    Attributes:
        shape: sizes of our array, without the leading layers axis.
        axes: logical axes of our array, one per dimension: "embed", "heads", "kv_heads",
            "head_dim", "mlp" or "vocab".
        hf_name: name of the checkpoint tensor, with "{layer}" where the parameter is stacked.
        hf_axes: the axes merged into each dimension of the checkpoint tensor.
        stacked: the parameter belongs to every layer; our array is `[layers, *shape]`.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    hf_name: str
    hf_axes: tuple[tuple[str, ...], ...]
    stacked: bool

    @property
    def split_axes(self) -> tuple[str, ...]:
        """Our axes in the order in which the checkpoint tensor stores them."""
        return tuple(axis for group in self.hf_axes for axis in group)

    @property
    def split_shape(self) -> tuple[int, ...]:
        """Sizes of `split_axes`."""
        return tuple(self.size(axis) for axis in self.split_axes)

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of the checkpoint tensor."""
        return tuple(prod(self.size(axis) for axis in group) for group in self.hf_axes)

    @property
    def permutation(self) -> tuple[int, ...]:
        """The transpose that takes `split_axes` to `axes`."""
        return tuple(self.split_axes.index(axis) for axis in self.axes)

    @property
    def inverse_permutation(self) -> tuple[int, ...]:
        """The transpose that takes `axes` to `split_axes`."""
        return tuple(self.axes.index(axis) for axis in self.split_axes)

    def size(self, axis: str) -> int:
        """Number of elements along one logical axis."""
        return self.shape[self.axes.index(axis)]

    def hf_names(self, num_layers: int) -> tuple[str, ...]:
        """Names of the checkpoint tensors, one per layer where the parameter is stacked."""
        if not self.stacked:
            return (self.hf_name,)
        return tuple(self.hf_name.format(layer=layer) for layer in range(num_layers))

    def from_hf(self, tensor: AnyArray) -> AnyArray:
        """Turns one checkpoint tensor `hf_shape` into our array `shape` (of one layer)."""
        return tensor.reshape(self.split_shape).transpose(self.permutation)

    def to_hf(self, array: AnyArray) -> AnyArray:
        """Turns our array `shape` (of one layer) into the checkpoint tensor `hf_shape`."""
        return array.transpose(self.inverse_permutation).reshape(self.hf_shape)


def decoder_parameters(config: LlamaConfig) -> dict[str, ParameterInfo]:
    """Every parameter of the decoder that `config` describes.

    Args:
        config: the model.

    Returns:
        Parameter name to its description. Absent are the unembedding where it is tied to the
        embedding, and biases and query/key norms that the model does not have.
    """
    sizes = {
        "vocab": config.vocab_size,
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
    }

    def info(
        axes: tuple[str, ...], hf_name: str, hf_axes: tuple[tuple[str, ...], ...]
    ) -> ParameterInfo:
        shape = tuple(sizes[axis] for axis in axes)
        return ParameterInfo(shape, axes, hf_name, hf_axes, stacked=False)

    def layer(
        axes: tuple[str, ...], hf_name: str, hf_axes: tuple[tuple[str, ...], ...]
    ) -> ParameterInfo:
        shape = tuple(sizes[axis] for axis in axes)
        return ParameterInfo(shape, axes, "model.layers.{layer}." + hf_name, hf_axes, stacked=True)

    queries, keys = ("heads", "head_dim"), ("kv_heads", "head_dim")
    table = {
        "embedding": info(
            ("vocab", "embed"), "model.embed_tokens.weight", (("vocab",), ("embed",))
        ),
        "attention_norm": layer(("embed",), "input_layernorm.weight", EMBED),
        "query": layer(("embed", *queries), "self_attn.q_proj.weight", (queries, ("embed",))),
        "key": layer(("embed", *keys), "self_attn.k_proj.weight", (keys, ("embed",))),
        "value": layer(("embed", *keys), "self_attn.v_proj.weight", (keys, ("embed",))),
        "output": layer((*queries, "embed"), "self_attn.o_proj.weight", (("embed",), queries)),
        "mlp_norm": layer(("embed",), "post_attention_layernorm.weight", EMBED),
        "gate": layer(("embed", "mlp"), "mlp.gate_proj.weight", (("mlp",), ("embed",))),
        "up": layer(("embed", "mlp"), "mlp.up_proj.weight", (("mlp",), ("embed",))),
        "down": layer(("mlp", "embed"), "mlp.down_proj.weight", (("embed",), ("mlp",))),
        "final_norm": info(("embed",), "model.norm.weight", EMBED),
    }
    if config.qkv_bias:
        table["query_bias"] = layer(queries, "self_attn.q_proj.bias", (queries,))
        table["key_bias"] = layer(keys, "self_attn.k_proj.bias", (keys,))
        table["value_bias"] = layer(keys, "self_attn.v_proj.bias", (keys,))
    if config.output_bias:
        table["output_bias"] = layer(("embed",), "self_attn.o_proj.bias", EMBED)
    if config.qk_norm:
        table["query_norm"] = layer(("head_dim",), "self_attn.q_norm.weight", HEAD_DIM)
        table["key_norm"] = layer(("head_dim",), "self_attn.k_norm.weight", HEAD_DIM)
    if config.mlp_bias:
        table["gate_bias"] = layer(("mlp",), "mlp.gate_proj.bias", (("mlp",),))
        table["up_bias"] = layer(("mlp",), "mlp.up_proj.bias", (("mlp",),))
        table["down_bias"] = layer(("embed",), "mlp.down_proj.bias", EMBED)
    if not config.tie_word_embeddings:
        table["unembedding"] = info(("embed", "vocab"), "lm_head.weight", (("vocab",), ("embed",)))
    return table
