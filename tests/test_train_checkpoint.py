"""Checkpoints: which are used, which are given up, and when their checksums are there."""

import gc
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from damage import flip_a_byte

from train.checkpoint import CHECKSUMS, Checkpoints
from train.step import TrainState

pytestmark = [
    pytest.mark.once,
    # What Orbax's threads leave behind where restoring failed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _leave_nothing_behind():
    """Other tests do not ignore these warnings."""
    yield
    gc.collect()


def state_of(step=3, **shapes):
    arrays = {name: jnp.ones(shape) for name, shape in (shapes or {"key": (4, 5)}).items()}
    return TrainState(jnp.int32(step), arrays, arrays)


def restored(folder, state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(state, jax.tree.map(lambda _: place, state))


@pytest.fixture
def folder(tmp_path):
    """Holds the checkpoints of steps 2 and 3."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in (2, 3):
            checkpoints.save(state_of(step))
    return tmp_path / "checkpoints"


OTHERS = [{"key": (4, 6)}, {"query": (4, 5)}, {"key": (4, 5), "query": (4, 5)}]


@pytest.mark.parametrize("shapes", OTHERS)
def test_one_that_is_whole_and_does_not_suit_the_job_is_an_error_and_stays(folder, shapes):
    with pytest.raises(ValueError, match=r"of step 3 in .* versions of Optax .*Nothing was delet"):
        restored(folder, state_of(**shapes))
    found = restored(folder, state_of())
    assert found is not None
    assert found.step == 3


@pytest.mark.parametrize("shapes", OTHERS)
def test_one_without_a_list_that_cannot_be_restored_is_damaged(folder, shapes):
    for step in ("2", "3"):
        (folder / step / CHECKSUMS).unlink()
    with pytest.warns(UserWarning, match=r"of step [23] in .* is damaged"):
        assert restored(folder, state_of(**shapes)) is None
    assert not any(folder.glob("[0-9]*"))


def test_one_whose_list_is_damaged_gives_way_to_the_one_before(folder):
    (folder / "3" / CHECKSUMS).write_text("")
    with pytest.warns(UserWarning, match=r"of step 3 in .* is damaged.* not valid JSON"):
        found = restored(folder, state_of())
    assert found is not None
    assert found.step == 2


def test_a_file_that_cannot_be_read_is_no_damage(folder, monkeypatch):
    def refused(path):
        raise PermissionError(f"not allowed: {path}")

    with monkeypatch.context() as patched:
        patched.setattr("train.checkpoint.file_sha256", refused)
        with pytest.raises(PermissionError, match="not allowed"):
            restored(folder, state_of())
    found = restored(folder, state_of())
    assert found is not None
    assert found.step == 3


def list_when_finished(checkpoints, checkpoint):
    deadline = time.monotonic() + 60
    while not (checkpoint / CHECKSUMS).is_file():
        assert time.monotonic() < deadline
        checkpoints.list_finished()
        time.sleep(0.01)


def test_a_job_that_was_cut_off_later_leaves_a_list_by_which_damage_is_found(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(state_of())
        list_when_finished(checkpoints, tmp_path / "checkpoints" / "3")
        # What a kill at this point leaves.
        shutil.copytree(tmp_path / "checkpoints", tmp_path / "left")
    flip_a_byte(tmp_path / "left" / "3")
    with pytest.warns(UserWarning, match=r"of step 3 in .* is damaged and is left out: changed: "):
        assert restored(tmp_path / "left", state_of()) is None


def test_a_save_in_progress_is_not_waited_for(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of())
        with monkeypatch.context() as patched:
            patched.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda self: True)
            patched.setattr(ocp.CheckpointManager, "wait_until_finished", None)
            checkpoints.list_finished()
        assert not (tmp_path / "3" / CHECKSUMS).is_file()
    assert (tmp_path / "3" / CHECKSUMS).is_file()


def test_a_save_that_failed_is_reported_when_it_would_be_listed(folder, monkeypatch):
    def failed(manager):
        raise ValueError("no space")

    with Checkpoints(folder) as checkpoints:
        checkpoints.save(state_of(4))
        with monkeypatch.context() as patched:
            patched.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda self: False)
            patched.setattr(ocp.CheckpointManager, "wait_until_finished", failed)
            with pytest.raises(
                OSError, match=r"step 4 could not be saved; step 3 is kept.* no space"
            ):
                checkpoints.list_finished()
