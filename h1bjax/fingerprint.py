"""What tells files apart, and one model's weights from another's without reading all of them."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from h1bjax.checkpoint import weight_files

SAMPLE_BYTES = 64 * 1024


def file_sha256(path: Path) -> str:
    """The sha256 of a whole file as it lies on the disk, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_fingerprint(folder: str | PathLike[str]) -> str:
    """A sha256 that identifies the weights of a model folder.

    It covers every tensor, in the order of their names: name, shape, dtype, and 64 KiB each from
    the beginning, the middle and the end of its bytes (all of a tensor of up to 192 KiB). A
    change that touches none of these goes unseen, but training changes every tensor everywhere.
    How the tensors are divided among files does not matter.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Returns:
        64 hexadecimal digits.

    Raises:
        FileNotFoundError: there are no safetensors files, or shards of the index are missing.
        ValueError: a file is not readable safetensors.
    """
    tensors = [tensor for file in weight_files(Path(folder)) for tensor in _tensors(file)]
    digest = hashlib.sha256()
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        described = json.dumps([tensor.name, tensor.shape, tensor.dtype, tensor.nbytes])
        digest.update(described.encode() + b"\n")
        for sample in _samples(tensor):
            digest.update(sample)
    return digest.hexdigest()


@dataclass(frozen=True)
class _StoredBytes:
    """Where a tensor's bytes are."""

    file: Path
    name: str
    shape: list[int]
    dtype: str
    begin: int  # in the file
    nbytes: int


def _tensors(file: Path) -> list[_StoredBytes]:
    """The tensors that a safetensors header lists.

    Read directly, because the library tells no offsets: 8 bytes hold the length of a JSON object
    of dtypes, shapes and offsets, which count from its end.
    """
    size = file.stat().st_size
    with file.open("rb") as data:
        length = int.from_bytes(data.read(8), "little")
        text = data.read(length) if length <= size - 8 else b""
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [
            _StoredBytes(
                file, name, entry["shape"], entry["dtype"], 8 + length + begin, end - begin
            )
            for name, entry in header.items()
            for begin, end in [entry["data_offsets"]]
        ]
        whole = all(tensor.begin + tensor.nbytes <= size for tensor in tensors)
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{file} is not a readable safetensors file; it may be a partial download or a Git "
            "LFS pointer."
        )
    return tensors


def _samples(tensor: _StoredBytes) -> Iterator[bytes]:
    spare = tensor.nbytes - SAMPLE_BYTES
    starts = [0, spare // 2, spare]
    length = SAMPLE_BYTES
    if tensor.nbytes <= len(starts) * SAMPLE_BYTES:
        starts, length = [0], tensor.nbytes
    with tensor.file.open("rb") as data:
        for start in starts:
            data.seek(tensor.begin + start)
            yield data.read(length)
