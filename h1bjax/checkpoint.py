"""Hugging Face checkpoints: found, streamed from safetensors into shardings, and written back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Sharding
from jaxtyping import Array, DTypeLike
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from h1bjax.config import DTYPES, LlamaConfig
from h1bjax.embedded import embedded_model
from h1bjax.parameters import ParameterInfo, decoder_parameters

ShardingRule = Callable[[tuple[str | None, ...]], Sharding]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "chat_template.json",
)
GENERATION_FILE = "generation_config.json"
# Buffers that older transformers wrote, recomputed from config.json by everyone.
IGNORED_TENSOR = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
READABLE_DTYPES = ("F64", "F32", "F16", "BF16")


def resolve_model(path_or_id: str | PathLike[str] | None, *, config_only: bool = False) -> Path:
    """Finds the folder of a model, downloading it from the Hugging Face hub where needed.

    Only configuration, tokenizer and safetensors files are downloaded; pickle files never are.

    Args:
        path_or_id: an existing folder (no network is touched), or a hub id such as "org/name".
            None is the model that ships inside the package.
        config_only: whether the two files that `LlamaConfig.from_hf` reads are enough.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: it is neither a folder nor shaped like a hub id, or the hub could not
            deliver it.
        ValueError: it is a file.
    """
    if path_or_id is None:
        return embedded_model()
    name, folder = str(path_or_id), Path(path_or_id)
    if name and folder.is_dir():
        return folder
    if name and folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds config.json.")
    # Imported here because most runs read a folder and need no HTTP client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"There is no folder {name!r}, and it is not shaped like a Hugging Face hub id "
            '("name" or "org/name").'
        ) from error
    # The base class of the HTTP client that this huggingface_hub uses: connection failures derive
    # from it, and need not be OSErrors.
    transport_error: type[Exception] = HfHubHTTPError.__mro__[1]
    everything = ["*.json", "*.safetensors", *TOKENIZER_PATTERNS]
    try:
        downloaded = snapshot_download(
            name,
            allow_patterns=["config.json", GENERATION_FILE] if config_only else everything,
            # Subfolders and consolidated files hold second copies of the same weights.
            ignore_patterns=["*/*", "consolidated*", *PICKLE_PATTERNS],
        )
    except (OSError, ValueError, RuntimeError, transport_error) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"There is no folder {name!r}, and the Hugging Face hub did not deliver a model of "
            f"that id: {reason}"
        ) from error
    return Path(downloaded)


def load_parameters(
    folder: str | PathLike[str],
    config: LlamaConfig,
    dtype: DTypeLike,
    sharding: ShardingRule | None = None,
) -> dict[str, Array]:
    """Streams the weights of a checkpoint into arrays of the decoder.

    Shards are opened one at a time and tensors read one at a time. A stacked parameter is
    allocated on its devices once and filled layer by layer in place, so that the host holds about
    one tensor besides the shard's file mapping. With a sharding, every device's part is read on
    its own.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.
        config: the model; decides which tensors there must be.
        dtype: floating dtype of every parameter.
        sharding: takes logical axes, None standing for the layers axis, to a sharding. Without
            it, everything lies on JAX's default device.

    Returns:
        One array per entry of `decoder_parameters(config)`, stacked ones with a leading layers
        axis.

    Raises:
        FileNotFoundError: there are no safetensors files, or shards of the index are missing.
        ValueError: tensors are missing, unexpected, misshapen or not floating point (all are
            listed, before any is read), or a file cannot be read, or `dtype` is not floating.
    """
    dtype = _floating_dtype(dtype)
    table = decoder_parameters(config)
    tensors = _read_headers(Path(folder))
    _check_tensors(Path(folder), tensors, table, config)
    owners = {
        hf_name: (name, layer)
        for name, info in table.items()
        for layer, hf_name in enumerate(info.hf_names(config.num_layers))
    }
    by_file: dict[Path, list[str]] = {}
    for hf_name in owners:
        by_file.setdefault(tensors[hf_name].file, []).append(hf_name)

    # All stacks come first, so that too small a device says so before anything is read.
    parameters = {
        name: _empty_stack(info, config, dtype, sharding)
        for name, info in table.items()
        if info.stacked
    }
    total = sum(tensors[hf_name].nbytes for hf_name in owners)
    # disable=None shows the bar on a terminal only.
    with tqdm(
        total=total, desc="Loading weights", unit="B", unit_scale=True, disable=None
    ) as progress:
        for file, hf_names in by_file.items():
            with safe_open(file, framework="numpy") as shard:
                for hf_name in hf_names:
                    name, layer = owners[hf_name]
                    info = table[name]
                    value = _read_tensor(shard.get_slice(hf_name), info, dtype, sharding)
                    if info.stacked:
                        place = None if sharding is None else sharding((None, *info.axes))
                        parameters[name] = _place_layer(parameters[name], value, layer, info, place)
                    else:
                        place = None if sharding is None else sharding(info.axes)
                        parameters[name] = _place(value, info, place)
                    # Waiting bounds the host buffers in flight to one tensor.
                    parameters[name].block_until_ready()
                    progress.update(tensors[hf_name].nbytes)
    return {name: parameters[name] for name in table}


def save_pretrained(
    folder: str | PathLike[str],
    config: LlamaConfig,
    parameters: Mapping[str, Array | np.ndarray],
    max_shard_bytes: float = 5e9,
    source: str | PathLike[str] | None = None,
) -> None:
    """Writes a model folder that transformers and `load_parameters` load.

    Tensors are brought to the host and written one at a time. config.json comes last, so an
    interrupted save leaves no folder that passes for a model.

    Args:
        folder: where to write; must be new or empty.
        config: the model. The dtype written is the embedding's.
        parameters: exactly the entries of `decoder_parameters(config)`.
        max_shard_bytes: weights beyond this many bytes are split into shards with an index. A
            single larger tensor is a shard of its own.
        source: a folder whose tokenizer files and generation_config.json are copied.

    Raises:
        FileNotFoundError: `source` is not a folder.
        ValueError: `folder` is not empty, is `source` or is a file, `max_shard_bytes` is not
            positive, or `parameters` does not fit `config` (every misfit is listed).
    """
    folder = Path(folder)
    source = None if source is None else Path(source)
    check_destination(folder, source)
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes must be positive, and is {max_shard_bytes}.")
    table = decoder_parameters(config)
    _check_parameters(parameters, table, config)
    config = replace(config, dtype=parameters["embedding"].dtype.name)
    # Fails, if it must, before gigabytes are written.
    config_json = json.dumps(config.to_hf(), indent=2) + "\n"

    folder.mkdir(parents=True, exist_ok=True)
    tensors = _stored_tensors(table, parameters, config)
    shards = _split_into_shards(tensors, max_shard_bytes)
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map = {}
    with tqdm(
        total=total, desc="Saving weights", unit="B", unit_scale=True, disable=None
    ) as progress:
        for number, shard in enumerate(shards, start=1):
            file = SINGLE_FILE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            for nbytes in _write_safetensors(folder / file, shard):
                progress.update(nbytes)
            weight_map.update({tensor.hf_name: file for tensor in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    if source is not None:
        for text_file in _text_files(source):
            shutil.copyfile(text_file, folder / text_file.name)
    (folder / "config.json").write_text(config_json, encoding="utf-8")


@dataclass(frozen=True)
class _TensorHeader:
    """What a safetensors header says of one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as "BF16"
    nbytes: int


def _floating_dtype(dtype: DTypeLike) -> np.dtype:
    wanted = jnp.dtype(dtype)
    if not jnp.issubdtype(wanted, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as bfloat16, and is {wanted}.")
    if jax.dtypes.canonicalize_dtype(wanted) != wanted:
        raise ValueError("dtype float64 needs jax.config.update('jax_enable_x64', True).")
    return wanted


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model's weights.

    Raises:
        FileNotFoundError: there are none, or shards of the index are missing.
        ValueError: the index is damaged, or names files outside the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no model folder {folder}.")
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    pickles = sorted({file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern)})
    if pickles:
        raise FileNotFoundError(
            f"{folder} holds only pickle files ({', '.join(pickles)}). Pickle is never loaded, "
            "because it can run any code. Convert once where torch is installed: "
            "transformers.AutoModelForCausalLM.from_pretrained(old).save_pretrained(new) writes "
            "safetensors."
        )
    raise FileNotFoundError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")


def _indexed_files(folder: Path) -> list[Path]:
    path = folder / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f'{path} must hold an object "weight_map" from tensor name to shard.')
    names = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ValueError(f"{path} names shards outside its folder: {', '.join(outside)}.")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{path} names shards that are not in the folder: {', '.join(absent)}. Download or "
            "copy them there."
        )
    return [folder / name for name in names]


def _read_headers(folder: Path) -> dict[str, _TensorHeader]:
    """Every tensor of the checkpoint by name, from the files' headers alone."""
    tensors: dict[str, _TensorHeader] = {}
    repeated = []
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as shard:
                for name in sorted(shard.keys()):
                    view = shard.get_slice(name)
                    shape, dtype = tuple(view.get_shape()), view.get_dtype()
                    width = int(dtype[-2:]) // 8 if dtype in READABLE_DTYPES else 0
                    if name in tensors:
                        repeated.append(f"{name} ({tensors[name].file.name} and {file.name})")
                    tensors[name] = _TensorHeader(file, shape, dtype, prod(shape) * width)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a readable safetensors file ({error}); it may be a partial "
                "download or a Git LFS pointer."
            ) from error
    if repeated:
        raise ValueError(f"Tensors are stored in two shards of {folder}: {', '.join(repeated)}.")
    return tensors


def _check_tensors(
    folder: Path,
    tensors: Mapping[str, _TensorHeader],
    table: Mapping[str, ParameterInfo],
    config: LlamaConfig,
) -> None:
    expected = {
        hf_name: info.hf_shape
        for info in table.values()
        for hf_name in info.hf_names(config.num_layers)
    }
    problems = []
    missing = [f"missing: {name} {list(shape)}" for name, shape in expected.items()]
    problems += [line for line, name in zip(missing, expected, strict=True) if name not in tensors]
    for name, tensor in sorted(tensors.items()):
        if name not in expected:
            redundant = config.tie_word_embeddings and name == "lm_head.weight"
            if not redundant and not IGNORED_TENSOR.search(name):
                problems.append(f"unexpected: {name} {list(tensor.shape)}")
            continue
        if tensor.shape != expected[name]:
            problems.append(
                f"misshapen: {name} is {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name])}"
            )
        if tensor.dtype not in READABLE_DTYPES:
            problems.append(
                f"not floating point: {name} is {tensor.dtype} (readable: "
                f"{', '.join(READABLE_DTYPES)})"
            )
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(
            f"The weights in {folder} do not fit its {config.model_type} config.json:{listed}"
        )


def _read_tensor(
    view: Any, info: ParameterInfo, dtype: np.dtype, sharding: ShardingRule | None
) -> Array:
    """One checkpoint tensor on its devices, shape `info.split_shape`, not yet in our order."""
    everything = (slice(None),) * len(info.split_shape)

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        part = _read_part(view, info, everything if index is None else index)
        return part.astype(dtype, copy=False)

    if sharding is None:
        return jnp.asarray(read(everything))
    return jax.make_array_from_callback(info.split_shape, sharding(info.split_axes), read)


def _read_part(view: Any, info: ParameterInfo, index: tuple[slice, ...]) -> np.ndarray:
    """Reads one part, given by a slice per axis of `split_axes`, of a checkpoint tensor.

    Each dimension of the file is read over the range that covers the part; where an inner axis of
    a merged dimension is itself cut (part of every head), the rest is dropped afterwards.
    """
    bounds = [cut.indices(size)[:2] for cut, size in zip(index, info.split_shape, strict=True)]
    file_slices: list[slice] = []
    read_shape: list[int] = []
    kept: list[slice] = []
    dimension = 0
    for group in info.hf_axes:
        start, stop = bounds[dimension]
        inner = [info.size(axis) for axis in group[1:]]
        file_slices.append(slice(start * prod(inner), stop * prod(inner)))
        read_shape += [stop - start, *inner]
        kept += [slice(None)]
        kept += [slice(*bounds[dimension + 1 + offset]) for offset in range(len(inner))]
        dimension += len(group)
    return view[tuple(file_slices)].reshape(read_shape)[tuple(kept)]


def _empty_stack(
    info: ParameterInfo, config: LlamaConfig, dtype: np.dtype, sharding: ShardingRule | None
) -> Array:
    device = None if sharding is None else sharding((None, *info.axes))
    return jnp.zeros((config.num_layers, *info.shape), dtype, device=device)


def _place_layer(
    stack: Array, value: Array, layer: int, info: ParameterInfo, sharding: Sharding | None
) -> Array:
    """Writes one layer `value` (axes in checkpoint order) into `stack`, in place."""
    place = jax.jit(_update_layer, static_argnums=3, donate_argnums=0, out_shardings=sharding)
    return place(stack, value, layer, info.permutation)


def _update_layer(stack: Array, value: Array, layer: int, permutation: tuple[int, ...]) -> Array:
    return lax.dynamic_update_index_in_dim(stack, value.transpose(permutation), layer, axis=0)


def _place(value: Array, info: ParameterInfo, sharding: Sharding | None) -> Array:
    """Brings `value` (axes in checkpoint order) into our order."""
    if info.permutation == tuple(range(value.ndim)):
        return value
    return jax.jit(jnp.transpose, static_argnums=1, out_shardings=sharding)(value, info.permutation)


@dataclass(frozen=True)
class _StoredTensor:
    """One tensor to write, read from the device only when its turn comes."""

    hf_name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def check_destination(folder: Path, source: Path | None = None) -> None:
    """Checks that `save_pretrained` can write there.

    Raises:
        FileNotFoundError: `source` is not a folder.
        ValueError: `folder` is not empty, is `source` or is a file.
    """
    if source is not None and not source.is_dir():
        raise FileNotFoundError(f"There is no source folder {source}.")
    if source is not None and folder.resolve() == source.resolve():
        raise ValueError(f"{folder} is the source of this model; write to another folder.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new or empty folder.")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty, and nothing is overwritten; give a new or empty folder."
        )


def copy_pretrained(source: Path, folder: Path) -> None:
    """Copies a model byte for byte: weights, config.json, tokenizer and generation files.

    A copy that fails takes back what it wrote.

    Raises:
        FileNotFoundError: `source` lacks config.json or weights.
        ValueError: `folder` is not empty, is `source` or is a file.
    """
    check_destination(folder, source)
    weights, config = weight_files(source), source / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"There is no config.json in {source}.")
    index = [] if weights == [source / SINGLE_FILE] else [source / INDEX_FILE]
    # config.json comes last, so an interrupted copy leaves no folder that passes for a model.
    files = [*weights, *index, *_text_files(source), config]
    copies = []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for file in tqdm(files, desc="Copying the model", unit="file", disable=None):
            copies.append(folder / file.name)
            shutil.copyfile(file, copies[-1])
    except BaseException:
        for copy in copies:
            copy.unlink(missing_ok=True)
        raise


def _check_parameters(
    parameters: Mapping[str, Array | np.ndarray],
    table: Mapping[str, ParameterInfo],
    config: LlamaConfig,
) -> None:
    problems = [f"missing: {name}" for name in table if name not in parameters]
    for name, array in parameters.items():
        if name not in table:
            problems.append(f"unexpected: {name} {list(array.shape)}")
            continue
        info = table[name]
        shape = (config.num_layers, *info.shape) if info.stacked else info.shape
        if array.shape != shape:
            problems.append(f"misshapen: {name} is {list(array.shape)} instead of {list(shape)}")
        if array.dtype.name not in DTYPES:
            problems.append(f"dtype: {name} is {array.dtype.name} (writable: {', '.join(DTYPES)})")
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"These parameters do not fit the {config.model_type} config:{listed}")


def _stored_tensors(
    table: Mapping[str, ParameterInfo],
    parameters: Mapping[str, Array | np.ndarray],
    config: LlamaConfig,
) -> list[_StoredTensor]:
    """Tensors in the order of the forward pass, so that a shard holds whole layers."""

    def stored(name: str, info: ParameterInfo, layer: int | None) -> _StoredTensor:
        array = parameters[name]

        def read() -> np.ndarray:
            # Reordered on the device, where it is fast; merging the axes then copies nothing.
            ordered = _reordered_layer(array, layer, order=info.inverse_permutation)
            return np.asarray(ordered).reshape(info.hf_shape)

        hf_name = info.hf_name if layer is None else info.hf_name.format(layer=layer)
        return _StoredTensor(hf_name, info.hf_shape, array.dtype, read)

    stacked = {name: info for name, info in table.items() if info.stacked}
    single = {name: info for name, info in table.items() if not info.stacked}
    return [
        stored("embedding", single.pop("embedding"), None),
        *(
            stored(name, info, layer)
            for layer in range(config.num_layers)
            for name, info in stacked.items()
        ),
        *(stored(name, info, None) for name, info in single.items()),
    ]


@partial(jax.jit, static_argnames=("order",))
def _reordered_layer(array: Array, layer: int | None, *, order: tuple[int, ...]) -> Array:
    if layer is not None:
        array = lax.dynamic_index_in_dim(array, layer, axis=0, keepdims=False)
    return array.transpose(order)


def _split_into_shards(
    tensors: list[_StoredTensor], max_shard_bytes: float
) -> list[list[_StoredTensor]]:
    shards: list[list[_StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_safetensors(path: Path, tensors: list[_StoredTensor]) -> Iterator[int]:
    """Writes one safetensors file, and yields the bytes written after every tensor.

    The format (https://huggingface.co/docs/safetensors) is an 8-byte little-endian header length,
    a JSON header of dtypes, shapes and offsets, and the tensors' bytes. Shapes are known
    beforehand, so the header can go first and the tensors follow one at a time, which the
    library's own writer does not offer.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.hf_name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data starts on a multiple of 8 bytes
    with path.open("xb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for tensor in tensors:
            data = np.ascontiguousarray(tensor.read())
            file.write(data.view(np.uint8).data)
            yield tensor.nbytes


def _text_files(source: Path) -> Iterator[Path]:
    """The tokenizer and generation files of a model folder."""
    for pattern in (*TOKENIZER_PATTERNS, GENERATION_FILE):
        yield from (file for file in source.glob(pattern) if file.is_file())
