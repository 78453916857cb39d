"""Text files: every kind gives the same documents, and what is wrong with a file is said."""

import gzip
import json
import lzma
import sys

import pytest
import zstandard

from h1bjax.text_files import read_documents

pytestmark = pytest.mark.once


DOCUMENTS = ["Once upon a time,\r\nthe thé ended: 日本\u2028and 😀\x0b.\n", " \n", "the end"]
COMPRESS = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: zstandard.ZstdCompressor().compress(data),
}


def jsonl(documents=DOCUMENTS, end="\n", **options):
    lines = [json.dumps({"title": "t", "text": text}, **options) for text in documents]
    return "".join(line + end for line in lines).encode()


@pytest.fixture
def write(tmp_path):
    def write(name, data):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


# Documents


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_txt_file_is_one_document_byte_for_byte(write, compression):
    file = write(f"a.txt{compression}", COMPRESS[compression](DOCUMENTS[0].encode()))
    assert read_documents([file]) == DOCUMENTS[:1]
    assert read_documents([str(file)]) == DOCUMENTS[:1]


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_line_of_a_jsonl_file_is_a_document(write, compression):
    file = write(f"a.jsonl{compression}", COMPRESS[compression](jsonl()))
    assert read_documents([file]) == DOCUMENTS


@pytest.mark.parametrize(
    "data",
    [
        jsonl(ensure_ascii=False),
        jsonl(end="\r\n"),
        jsonl(end="\n\n"),
        jsonl()[:-1],
        jsonl([DOCUMENTS[0], "", *DOCUMENTS[1:]]),
    ],
    ids=["raw characters", "crlf", "blank lines", "no last newline", "empty document"],
)
def test_jsonl_may_be_written_in_many_ways(write, data):
    assert read_documents([write("a.jsonl", data)]) == DOCUMENTS


def test_files_are_read_in_the_order_given(write):
    second, first = write("2.txt", b"two"), write("1.JSONL", jsonl(["one", "one and a half"]))
    assert read_documents([first, second]) == ["one", "one and a half", "two"]
    assert read_documents((second, first)) == ["two", "one", "one and a half"]


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
def test_compressed_files_may_be_joined(write, compression):
    compress = COMPRESS[compression]
    file = write(f"a.txt{compression}", compress(b"one ") + compress(b"two"))
    assert read_documents([file]) == ["one two"]


# Mistakes


def test_all_missing_files_are_named(write, tmp_path):
    there = write("a.txt", b"a")
    with pytest.raises(FileNotFoundError, match=r"No such file: .*b\.txt, .*c\.pdf$"):
        read_documents([tmp_path / "b.txt", there, tmp_path / "c.pdf"])


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file"):
        read_documents([tmp_path])


def test_all_names_of_an_unknown_kind_are_listed(write):
    files = [write(name, b"a") for name in ("a.pdf", "b.txt", "c", "d.gz", "e.txt.bz2")]
    with pytest.raises(ValueError, match=r"a\.pdf, .*c, .*d\.gz, .*e\.txt\.bz2$") as error:
        read_documents(files)
    assert "b.txt" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", r"a\.txt is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"a\.jsonl:2 is not UTF-8 text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', r"a\.jsonl:3 is not valid JSON"),
        ("a.jsonl", b'["text"]\n', r'a\.jsonl:1 is not an object with a string "text"'),
        ("a.jsonl", b'{"title": "t"}\n', r'a\.jsonl:1 is not an object with a string "text"'),
        ("a.jsonl", b'{"text": 1}\n', r'a\.jsonl:1 is not an object with a string "text"'),
        ("a.jsonl", b'{"text": "ab\\ud800"}\n', r"a\.jsonl:1: .* lone surrogate at character 2"),
        ("a.txt", b"", r"a\.txt has no text"),
        ("a.jsonl", b"\n \n", r"a\.jsonl has no text"),
        ("a.jsonl", b'{"text": ""}\n', r"a\.jsonl has no text"),
        ("a.txt.xz", lzma.compress(b""), r"a\.txt\.xz has no text"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(write, name, data, message):
    good = write("good.txt", b"good")
    with pytest.raises(ValueError, match=message):
        read_documents([good, write(name, data)])


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"no" + data])
def test_damaged_compression_is_an_error(write, compression, damage):
    whole = COMPRESS[compression](bytes(range(128)) * 50)
    with pytest.raises(ValueError, match=rf"a\.txt\{compression} is damaged"):
        read_documents([write(f"a.txt{compression}", damage(whole))])


def test_without_zstandard_the_error_names_it(write, monkeypatch):
    file = write("a.txt.zst", COMPRESS[".zst"](b"a"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package zstandard"):
        read_documents([file])


@pytest.mark.parametrize(
    ("paths", "message"), [([], "no text file"), ("a.txt", "a list of files, not the single path")]
)
def test_paths_are_a_list(paths, message):
    with pytest.raises(ValueError, match=message):
        read_documents(paths)
