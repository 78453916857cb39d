"""Calibrations kept beside the weights that they were made for.

The folder `calibration` of a model folder holds two files per calibrated cache, named like the
cache: a safetensors file with the arrays, float32, under the names of `CodecParameters`' fields
and `value_rotation`; and a JSON file that says what they belong to. Without its JSON file an
array file means nothing.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any, Self

import flax
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int32
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from h1bjax.cache import (
    CacheSpec,
    CodecParameters,
    GaussianSigns,
    LinearCode,
    OrthogonalSigns,
    QuantisedValues,
    TwoPlanes,
)
from h1bjax.cache.channel_keys import ChannelQuantisedKeys
from h1bjax.calibrate import Calibration
from h1bjax.config import LlamaConfig
from h1bjax.decoder import init_codec
from h1bjax.fingerprint import file_sha256, weights_fingerprint
from h1bjax.json_file import read_json_object

FORMAT = 1
FOLDER = "calibration"
ROTATION = "value_rotation"

_CODECS = {
    codec.__name__: codec
    for codec in (
        ChannelQuantisedKeys,
        GaussianSigns,
        LinearCode,
        OrthogonalSigns,
        QuantisedValues,
        TwoPlanes,
    )
}
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class CalibrationText:
    """The text that a calibration was made from.

    Attributes:
        files: name and sha256 of each text file, as it lies on the disk.
        tokens: how many tokens were read.
        tokens_sha256: of their ids in order, little-endian int32.
        context: tokens of each window.
        seed: of the choice of windows, and of the calibration.
    """

    files: Mapping[str, str]
    tokens: int
    tokens_sha256: str
    context: int
    seed: int

    @classmethod
    def of(
        cls,
        paths: Sequence[str | PathLike[str]],
        windows: Int32[np.ndarray, "windows context"],
        seed: int,
    ) -> Self:
        """Describes the windows that were drawn from text files."""
        return cls(
            files={Path(path).name: file_sha256(Path(path)) for path in paths},
            tokens=windows.size,
            tokens_sha256=hashlib.sha256(windows.astype("<i4").tobytes()).hexdigest(),
            context=windows.shape[1],
            seed=seed,
        )


def is_calibratable(spec: CacheSpec) -> bool:
    """Whether a cache has parameters that calibration fits."""
    return spec.sketch is not None or (spec.values is not None and spec.values.rotated)


def needs_calibration(spec: CacheSpec) -> bool:
    """Whether a cache is of no use without a calibration."""
    return spec.sketch is not None and not spec.sketch.data_free


def calibration_path(folder: str | PathLike[str], name: str) -> Path:
    """The JSON file of the calibration for the cache of that name."""
    return Path(folder) / FOLDER / f"{name}.json"


def calibrated_names(folder: str | PathLike[str]) -> list[str]:
    """The caches that a model folder has calibrations for, by name."""
    return sorted(path.stem for path in (Path(folder) / FOLDER).glob("*.json"))


def save_calibration(
    folder: str | PathLike[str], calibration: Calibration, text: CalibrationText
) -> Path:
    """Writes a calibration beside the weights that it was made for.

    The files get their names when they are whole, the JSON file last, so an interrupted save
    leaves nothing that passes for a calibration.

    Args:
        folder: the model's.
        calibration: for a spec whose name can be a file's.
        text: what it was made from.

    Returns:
        The array file.

    Raises:
        FileExistsError: there is a calibration of that name.
        FileNotFoundError: the folder holds no model.
        ValueError: the name cannot be a file's, or the arrays do not fit the spec and the model,
            or are not finite (all problems are listed).
    """
    folder, spec = Path(folder), calibration.spec
    if not _FILE_NAME.fullmatch(spec.name):
        raise ValueError(
            f"the cache name {spec.name!r} cannot be a file's; use letters, digits, '.', '_', '-'"
        )
    path = calibration_path(folder, spec.name)
    if path.exists():
        raise FileExistsError(f"{path} exists, and nothing is overwritten")
    arrays = _arrays(calibration)
    problems = _misfits(arrays, _expected_shapes(LlamaConfig.from_hf(folder), spec))
    problems += [
        f"not finite: {name}" for name, array in arrays.items() if not np.isfinite(array).all()
    ]
    if problems:
        raise ValueError(_listed(f"this calibration for {spec.name!r} cannot be saved", problems))
    cache, weights = _describe(spec), weights_fingerprint(folder)

    path.parent.mkdir(exist_ok=True)
    array_path = path.with_name(f"{spec.name}.safetensors")
    unfinished = [file.with_name(f"{file.name}.partial") for file in (array_path, path)]
    try:
        save_file(arrays, unfinished[0])
        description = {
            "format": FORMAT,
            "cache": cache,
            "weights": weights,
            "arrays_sha256": file_sha256(unfinished[0]),
            "text": dataclasses.asdict(text),
            "versions": {
                "h1bjax": _own_version(),
                "jax": jax.__version__,
                "flax": flax.__version__,
            },
        }
        unfinished[1].write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        unfinished[0].replace(array_path)
        unfinished[1].replace(path)
    finally:
        for file in unfinished:
            file.unlink(missing_ok=True)
    return array_path


def check_calibrations(folder: str | PathLike[str]) -> None:
    """Checks that the calibrations in a model's folder, if any, belong there.

    Raises:
        ValueError: one is of an unknown format or codec, or was made for other weights (all such
            are listed).
    """
    _read_descriptions(Path(folder))


def find_calibration(folder: str | PathLike[str], spec: CacheSpec) -> Calibration | None:
    """The calibration beside the weights that fits a cache, whatever its name.

    It fits if everything but the name is equal: both codecs, sinks, window, scores and RoPE
    period. Of several, the one of the same name is taken, then the first by name.

    Args:
        folder: the model's.
        spec: the cache.

    Returns:
        None if there is none.

    Raises:
        ValueError: a calibration there is of an unknown format or codec or was made for other
            weights (all such are listed), or the arrays of the one that fits are damaged, missing
            or misshapen (likewise).
    """
    folder = Path(folder)
    fitting = [
        found for found in _read_descriptions(folder) if found.spec.replace(name=spec.name) == spec
    ]
    if not fitting:
        return None
    best = min(fitting, key=lambda found: found.spec.name != spec.name)
    arrays = _read_arrays(best, _expected_shapes(LlamaConfig.from_hf(folder), best.spec))
    rotation = arrays.pop(ROTATION, None)
    return Calibration(best.spec, CodecParameters(**arrays) if arrays else None, rotation)


@dataclass(frozen=True)
class _Description:
    """What the JSON file says that loading must know."""

    spec: CacheSpec
    array_path: Path
    arrays_sha256: str


def _describe(part: Any) -> dict[str, Any]:
    """A spec or codec as JSON: its fields, and the class of a codec."""
    described = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    for name, value in described.items():
        if dataclasses.is_dataclass(value):
            codec = type(value).__name__
            if codec not in _CODECS:
                raise ValueError(f"calibrations for the codec {codec} cannot be saved")
            described[name] = {"codec": codec, **_describe(value)}
    return described


def _read_descriptions(folder: Path) -> list[_Description]:
    """Reads all JSON files of a model's folder; see `check_calibrations`."""
    if (folder / FOLDER).exists() and not (folder / FOLDER).is_dir():
        raise ValueError(f"{folder / FOLDER} is not a folder of calibrations")
    names = calibrated_names(folder)
    weights = weights_fingerprint(folder) if names else ""
    descriptions, problems = [], []
    for name in names:
        try:
            descriptions.append(_read_description(calibration_path(folder, name), weights))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError(
            _listed(f"calibrations in {folder / FOLDER} cannot be used; remove them", problems)
        )
    return descriptions


def _read_description(path: Path, weights: str) -> _Description:
    """Reads a JSON file.

    Raises:
        ValueError: it is damaged, of an unknown format or codec, or for other weights than the
            fingerprint tells.
    """
    content = read_json_object(path)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{path.name} is of format {content.get('format')!r}, and this version reads {FORMAT}"
        )
    if content.get("weights") != weights:
        raise ValueError(f"{path.name} was made for other weights than those in {path.parents[1]}")
    spec = _read_spec(path, content.get("cache"))
    array_path = path.with_name(f"{path.stem}.safetensors")
    return _Description(spec, array_path, str(content.get("arrays_sha256")))


def _read_spec(path: Path, described: Any) -> CacheSpec:
    if not isinstance(described, dict):
        raise ValueError(f"{path.name} does not describe its cache")
    fields = {}
    for name, value in described.items():
        if isinstance(value, dict):
            keywords = dict(value)
            codec = keywords.pop("codec", None)
            if not isinstance(codec, str) or codec not in _CODECS:
                raise ValueError(
                    f"{path.name} names the codec {codec!r}, and this version knows "
                    f"{', '.join(_CODECS)}"
                )
            fields[name] = _construct(path, _CODECS[codec], keywords)
        else:
            fields[name] = value
    return _construct(path, CacheSpec, fields)


def _construct(path: Path, part: type, fields: dict[str, Any]) -> Any:
    try:
        return part(**fields)
    # A TypeError is a field that this version does not know, or of the wrong type.
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} describes no valid {part.__name__}: {error}") from error


def _read_arrays(found: _Description, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Array]:
    path = found.array_path
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if file_sha256(path) != found.arrays_sha256:
        raise ValueError(f"{path} is damaged: it is not the file that was saved")
    try:
        arrays = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if problems := _misfits(arrays, expected):
        raise ValueError(_listed(f"{path} does not fit its cache and model", problems))
    return {name: jnp.asarray(array) for name, array in arrays.items()}


def _arrays(calibration: Calibration) -> dict[str, np.ndarray]:
    """Everything that was fitted, by name."""
    arrays = _codec_arrays(calibration.codec)
    if calibration.rotation is not None:
        arrays[ROTATION] = calibration.rotation
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _codec_arrays(codec: CodecParameters | None) -> dict[str, Array]:
    if codec is None:
        return {}
    return {name: param[...] for name, param in vars(codec).items() if isinstance(param, nnx.Param)}


def _expected_shapes(config: LlamaConfig, spec: CacheSpec) -> dict[str, tuple[int, ...]]:
    """The arrays that a calibration for `spec` holds: those that its codec has untrained."""
    untrained = jax.eval_shape(lambda: _codec_arrays(init_codec(config, spec, jax.random.key(0))))
    shapes = {name: array.shape for name, array in untrained.items()}
    if spec.values is not None and spec.values.rotated:
        heads = (config.num_layers, config.num_kv_heads)
        shapes[ROTATION] = (*heads, config.head_dim, config.head_dim)
    return shapes


def _misfits(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    problems = [
        f"missing: {name} {list(expected[name])}" for name in expected if name not in arrays
    ]
    for name, array in sorted(arrays.items()):
        if name not in expected:
            problems.append(f"unexpected: {name} {list(array.shape)}")
            continue
        if array.shape != expected[name]:
            problems.append(
                f"misshapen: {name} is {list(array.shape)} instead of {list(expected[name])}"
            )
        if array.dtype != np.float32:
            problems.append(f"dtype: {name} is {array.dtype} instead of float32")
    return problems


def _listed(heading: str, problems: Sequence[str]) -> str:
    return f"{heading}:" + "".join(f"\n  {problem}" for problem in problems)


def _own_version() -> str | None:
    """None for a source tree that is not installed."""
    try:
        return version("h1bjax")
    except PackageNotFoundError:
        return None
