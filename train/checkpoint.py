"""Saving and restoring the state of a job with Orbax."""

from pathlib import Path
from types import TracebackType
from typing import Self

import jax
import orbax.checkpoint as ocp

from train.step import TrainState

KEPT = 2
"""The newest checkpoints stay; older ones are deleted."""


class Checkpoints:
    """The checkpoints of one job, one folder for each step that was saved.

    A checkpoint gets its final name only when it is complete, so that an interrupted save leaves
    none. Use it as a context manager, which waits for the last save to end.
    """

    def __init__(self, folder: Path):
        """Opens the folder, which is made where it is missing."""
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves in the background, once the state has been copied to the host."""
        self._manager.save(int(state.step), args=ocp.args.StandardSave(state))

    def restore(self, shapes: TrainState) -> TrainState:
        """The newest state, on the default device.

        Args:
            shapes: a state of the same job, or the shapes and dtypes of one.
        """
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
        )
        return self._manager.restore(self.latest, args=ocp.args.StandardRestore(abstract))
