"""Reading documents from text files, compressed or not."""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

_KINDS = (".txt", ".jsonl")
_COMPRESSIONS = (".gz", ".xz", ".zst")


def read_documents(paths: Sequence[str | PathLike[str]]) -> list[str]:
    r"""The documents in text files, in the order of the files and of the lines in them.

    A .txt file is one document: its UTF-8 bytes as they stand, "\r\n" included. In a .jsonl file
    each line is an object whose string "text" is one document; blank lines and empty documents
    are left out. Either may be compressed: .gz, .xz or, with the package zstandard, .zst.

    Args:
        paths: files named like book.txt, books.jsonl or books.jsonl.xz.

    Raises:
        FileNotFoundError: files are missing; all of them are named.
        ValueError: names are of an unknown kind (all are listed), a file is damaged or not UTF-8,
            a line is no such object, or a file has no text.
        ModuleNotFoundError: zstandard is not installed and a file needs it.
    """
    if isinstance(paths, str | PathLike):
        raise ValueError(f"give a list of files, not the single path {str(paths)!r}")
    files = [Path(path) for path in paths]
    if not files:
        raise ValueError("no text file was given")
    _check_names(files)
    return [document for file in files for document in _documents(file)]


def _check_names(files: list[Path]) -> None:
    if missing := [str(file) for file in files if not file.is_file()]:
        raise FileNotFoundError(f"No such file: {', '.join(missing)}")
    if unknown := [str(file) for file in files if _kind(file) not in _KINDS]:
        raise ValueError(
            f"text files end in .txt or .jsonl, compressed ones in .gz, .xz or .zst after that; "
            f"not so: {', '.join(unknown)}"
        )


def _kind(file: Path) -> str:
    name = Path(file.stem) if file.suffix.lower() in _COMPRESSIONS else file
    return name.suffix.lower()


def _documents(file: Path) -> list[str]:
    data = _decompressed(file)
    found = [_decode(data, str(file))] if _kind(file) == ".txt" else _lines(data, file)
    documents = [document for document in found if document]
    if not documents:
        raise ValueError(f"{file} has no text")
    return documents


def _lines(data: bytes, file: Path) -> Iterator[str]:
    # Not splitlines, which also ends lines where JSON does not.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield _text_field(line, f"{file}:{number}")


def _text_field(line: bytes, where: str) -> str:
    try:
        entry = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    text = entry.get("text") if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} is not an object with a string "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f'{where}: "text" has a lone surrogate at character {error.start}, which UTF-8 '
            "cannot write"
        ) from error
    return text


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text: {error}") from error


def _decompressed(file: Path) -> bytes:
    data = file.read_bytes()
    suffix = file.suffix.lower()
    try:
        if suffix == ".gz":
            return gzip.decompress(data)
        if suffix == ".xz":
            return lzma.decompress(data)
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    return _zstandard(data, file) if suffix == ".zst" else data


def _zstandard(data: bytes, file: Path) -> bytes:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"reading {file} needs the package zstandard: pip install zstandard"
        ) from error
    frames = []
    while data:
        # One frame at a time, because only such an object tells whether a frame is whole.
        frame = zstandard.ZstdDecompressor().decompressobj()
        try:
            frames.append(frame.decompress(data))
        except zstandard.ZstdError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        if not frame.eof:
            raise ValueError(f"{file} is damaged: it ends in the middle of a zstd frame")
        data = frame.unused_data
    return b"".join(frames)
