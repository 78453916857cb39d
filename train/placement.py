"""Where the arrays of a job lie: on one device, or divided among those of a mesh."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding
from jaxtyping import Array, Int32

from h1bjax.config import LlamaConfig
from h1bjax.parameters import decoder_parameters
from h1bjax.sharding import (
    BATCH,
    SEQUENCE,
    TENSOR,
    check_mesh,
    make_mesh,
    parameter_sharding,
    put,
)
from train.student import CODEC, IN, LORA, OUT, ROTATION, TEACHER, input_axes


@dataclass(frozen=True)
class Placement:
    """Where arrays go by their names, see `train.student`.

    Rows of a batch are divided along the mesh's `batch`, weights and the key codec along its
    `tensor` where that divides them. What an optimizer keeps of an array lies where the array
    does. XLA does the rest.

    Attributes:
        config: the model's.
        mesh: None for the default device alone.
    """

    config: LlamaConfig
    mesh: Mesh | None

    @classmethod
    def create(cls, config: LlamaConfig, sizes: str | None, rows: int) -> Self:
        """That of a mesh in text, see `make_mesh`.

        Args:
            config: the model's.
            sizes: None for the default device alone.
            rows: that are computed at a time.

        Raises:
            ValueError: there is no such mesh, or it does not divide the model or the rows.
        """
        if sizes is None:
            return cls(config, None)
        mesh = make_mesh(sizes)
        check_mesh(mesh, config)
        if mesh.shape[SEQUENCE] > 1:
            raise ValueError(
                f"sequence={mesh.shape[SEQUENCE]}: training does not divide the tokens of a row; "
                "give these devices to batch or tensor"
            )
        if rows % mesh.shape[BATCH]:
            raise ValueError(
                f"batch={mesh.shape[BATCH]} of the mesh does not divide the {rows} rows that are "
                "computed at a time"
            )
        return cls(config, mesh)

    def of_name(self, name: str | None) -> Sharding:
        """Where an array goes; those without a name are everywhere."""
        if self.mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        if name is None:
            return NamedSharding(self.mesh, PartitionSpec())
        if name == ROTATION or name.startswith(CODEC):
            # All begin with layers, then KV heads or heads, which `tensor` divides.
            return NamedSharding(self.mesh, PartitionSpec(None, TENSOR))
        rule = parameter_sharding(self.mesh, self.config)
        return rule(self._axes(name))

    def _axes(self, name: str) -> tuple[str | None, ...]:
        table = decoder_parameters(self.config)
        name = name.removeprefix(TEACHER)
        if not name.startswith(LORA):
            info = table[name]
            return (None, *info.axes) if info.stacked else info.axes
        matrix = name.removeprefix(LORA).removesuffix(IN).removesuffix(OUT)
        axes, inputs = table[matrix].axes, input_axes(table[matrix])
        return (None, *axes[:inputs], None) if name.endswith(IN) else (None, None, *axes[inputs:])

    def of_tree(self, tree: Any) -> Any:
        """Where the leaves of a state go: by the innermost name on the way to each."""

        def place(path: tuple[Any, ...], _: Any) -> Sharding:
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            return self.of_name(next((name for name in reversed(names) if self._knows(name)), None))

        return jax.tree_util.tree_map_with_path(place, tree)

    def _knows(self, name: str) -> bool:
        return name.startswith((CODEC, LORA)) or name in decoder_parameters(self.config)

    def place(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Arrays where they belong."""
        return {name: put(array, self.of_name(name)) for name, array in arrays.items()}

    def place_rows(self, windows: Int32[np.ndarray, "batch tokens"]) -> Array | np.ndarray:
        """The rows of a batch where they belong."""
        if self.mesh is None:
            return windows
        return put(windows, NamedSharding(self.mesh, PartitionSpec(BATCH)))
