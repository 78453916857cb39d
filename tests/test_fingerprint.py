"""What the fingerprint of weights sees, and what it does not."""

import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from toy import toy_config, toy_parameters, write_toy

from h1bjax.checkpoint import save_pretrained
from h1bjax.fingerprint import SAMPLE_BYTES, weights_fingerprint

pytestmark = pytest.mark.once


def fingerprint(folder, **tensors):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return weights_fingerprint(folder)


def test_it_is_a_sha256(toy_folder):
    assert len(weights_fingerprint(toy_folder)) == 64
    assert int(weights_fingerprint(toy_folder), 16) > 0


def test_the_same_weights_in_several_files_are_the_same(toy_folder, tmp_path):
    save_pretrained(
        tmp_path / "shards",
        toy_config(),
        toy_parameters(toy_config()),
        max_shard_bytes=30_000,
    )
    save_pretrained(tmp_path / "whole", toy_config(), toy_parameters(toy_config()))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert weights_fingerprint(tmp_path / "shards") == weights_fingerprint(tmp_path / "whole")
    # The toy folder's unembedding differs.
    assert weights_fingerprint(toy_folder) != weights_fingerprint(tmp_path / "whole")


def test_only_the_weights_count(tmp_path):
    folder = write_toy(tmp_path / "toy")
    before = weights_fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text("{}")
    assert weights_fingerprint(tmp_path / "copy") == before


def test_one_changed_row_of_a_small_tensor_is_another(tmp_path):
    parameters = toy_parameters(toy_config())
    save_pretrained(tmp_path / "before", toy_config(), parameters)
    changed = {**parameters, "down": parameters["down"].at[1, 20].multiply(2)}
    save_pretrained(tmp_path / "after", toy_config(), changed)
    assert weights_fingerprint(tmp_path / "before") != weights_fingerprint(tmp_path / "after")


@pytest.mark.parametrize(
    ("row", "seen"), [(0, True), (15, True), (40, False), (248, True), (480, False), (511, True)]
)
def test_a_large_tensor_is_read_at_its_beginning_middle_and_end(tmp_path, row, seen):
    # 512 rows of 4 KiB: the first, middle and last 16 are read.
    weight = np.zeros((512, 1024), np.float32)
    assert 16 * weight[0].nbytes == SAMPLE_BYTES
    before = fingerprint(tmp_path / "before", weight=weight)
    weight[row, 3] = 1.0
    assert (fingerprint(tmp_path / "after", weight=weight) != before) == seen


def test_shapes_names_and_dtypes_count(tmp_path):
    weight = np.zeros((4, 8), np.float32)
    prints = [
        fingerprint(tmp_path / "a", weight=weight),
        fingerprint(tmp_path / "b", weight=weight.reshape(8, 4)),
        fingerprint(tmp_path / "c", other=weight),
        fingerprint(tmp_path / "d", weight=weight.view(np.int32)),
        fingerprint(tmp_path / "e", weight=weight, other=weight[:0]),
    ]
    assert len({*prints}) == len(prints)


def test_sixteen_bit_weights_are_read(tmp_path):
    parameters = {
        name: array.astype(jnp.bfloat16) for name, array in toy_parameters(toy_config()).items()
    }
    save_pretrained(tmp_path / "toy", toy_config(), parameters)
    assert len(weights_fingerprint(tmp_path / "toy")) == 64


@pytest.mark.parametrize("size", [0, 5, 400, -1])
def test_a_truncated_file_is_named(tmp_path, size):
    folder = write_toy(tmp_path / "toy")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors"):
        weights_fingerprint(folder)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        weights_fingerprint(tmp_path)
