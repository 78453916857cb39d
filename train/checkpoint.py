"""Saving and restoring the state of a job with Orbax."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp

from h1bjax.fingerprint import file_sha256
from h1bjax.json_file import read_json_object
from h1bjax.whole_file import replace_text
from train.processes import is_first
from train.step import TrainState

KEPT = 2
"""The newest checkpoints stay; older ones are deleted."""

CHECKSUMS = "checksums.json"


class Checkpoints:
    """The checkpoints of one job, one folder for each step that was saved.

    A checkpoint gets its final name only when it is complete, so that an interrupted save leaves
    none, and an older one is deleted only after that. A list of the sha256 of its files follows,
    see `list_finished`, by which a damaged checkpoint is known. Use it as a context manager, which
    waits for the last save to end.
    """

    def __init__(self, folder: Path):
        """Opens the folder, which is made where it is missing."""
        self._folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._saving: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, which may be in progress; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Saves in the background, once the state has been copied to the host.

        Raises:
            OSError: this save cannot begin, or the one before it failed. Older ones are kept.
        """
        self.finish()
        self._saving = int(state.step)
        with self._reporting(self._saving):
            self._manager.save(self._saving, args=ocp.args.StandardSave(state))

    def list_finished(self) -> None:
        """Lists the files of the last save if it has ended, and otherwise does nothing.

        Whoever calls this now and then protects a checkpoint soon after it was written.

        Raises:
            OSError: the save failed. Older ones are kept.
        """
        if not self._manager.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Waits for the save in progress, and lists the files that it wrote.

        Raises:
            OSError: the save failed. Older ones are kept.
        """
        if self._saving is None:
            return
        step, self._saving = self._saving, None
        with self._reporting(step):
            self._manager.wait_until_finished()
            if not is_first():
                return
            listed = _checksums(self._folder / str(step))
            replace_text(self._list(step), json.dumps(listed, indent=2) + "\n")

    def restore(self, shapes: TrainState, places: Any) -> TrainState | None:
        """The newest state that is not damaged; None where there is none.

        Damaged checkpoints are deleted with a warning, because the job will save these steps
        again.

        Args:
            shapes: the shapes and dtypes of a state of the same job.
            places: where its leaves go, shardings in the same tree.

        Raises:
            ValueError: a checkpoint is as it was written, and cannot be restored. It is kept.
            OSError: the files of a checkpoint cannot be read. It is kept.
        """
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            places,
        )
        for step in sorted(self._manager.all_steps(), reverse=True):
            listed = self._list(step).is_file()
            damage = self._damage(step) if listed else None
            if damage is None:
                try:
                    return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
                except (ValueError, OSError, KeyError) as error:
                    if listed:
                        raise ValueError(
                            f"the checkpoint of step {step} in {self._folder} is as it was "
                            "written, and cannot be restored; probably other versions of Optax or "
                            "Orbax or another job wrote it. Nothing was deleted: use those "
                            f"versions, or give another folder. {error}"
                        ) from error
                    # The job was cut off before the list was written, and perhaps the files
                    # before they were on the disk.
                    damage = str(error)
            warnings.warn(
                f"the checkpoint of step {step} in {self._folder} is damaged and is left out: "
                f"{damage}",
                stacklevel=2,
            )
            self._manager.delete(step)
        return None

    @contextmanager
    def _reporting(self, step: int) -> Iterator[None]:
        try:
            yield
        # TensorStore reports a full disk as a ValueError.
        except (ValueError, OSError) as error:
            kept = [saved for saved in self._manager.all_steps() if saved != step]
            remains = f"step {max(kept)} is kept" if kept else "there is no other"
            raise OSError(
                f"the checkpoint of step {step} could not be saved; {remains}. Make room on the "
                f"disk and run the same job again to go on from there. {error}"
            ) from error

    def _list(self, step: int) -> Path:
        return self._folder / str(step) / CHECKSUMS

    def _damage(self, step: int) -> str | None:
        """How the files differ from their list; None where they do not."""
        try:
            listed = read_json_object(self._list(step))
            found = _checksums(self._folder / str(step))
        # Another process may be deleting the same checkpoint.
        except (ValueError, FileNotFoundError) as error:
            return str(error)
        if missing := sorted(set(listed) - set(found)):
            return f"missing: {', '.join(missing)}"
        if changed := [name for name in found if listed.get(name) != found[name]]:
            return f"changed: {', '.join(changed)}"
        return None


def _checksums(folder: Path) -> dict[str, str]:
    """The sha256 of each file in the folders of a checkpoint, by its path."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.parent != folder)
    return {str(file.relative_to(folder)): file_sha256(file) for file in files}
