"""Fixtures that every test file may use."""

import os
from pathlib import Path

import pytest

# Read when jax is imported. Tests spend most of their time on compilation, which this halves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What was compiled is kept for other processes and for the next run; --cache-clear removes it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "d" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Several processes test on one GPU, so none may take most of its memory at its start.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Virtual devices, over which tests of sharding divide arrays.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from toy import byte_level, readable, sentencepiece, write_toy


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real models and text kept beside the repository; tests that want them skip without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not there")
    return folder


@pytest.fixture(scope="session")
def stories(shared_data: Path) -> Path:
    """A real pretrained Llama of 260 thousand parameters."""
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """A small random Llama with a byte-level tokenizer, whose text is mostly printable."""
    return write_toy(tmp_path_factory.mktemp("toy"), byte_level(), readable)


@pytest.fixture(scope="session")
def bos_folder(tmp_path_factory) -> Path:
    """The same with a SentencePiece-style tokenizer that adds a BOS, and text of any bytes."""
    return write_toy(tmp_path_factory.mktemp("bos"), sentencepiece())


@pytest.fixture(scope="session")
def untokenized_folder(tmp_path_factory) -> Path:
    """The same without a tokenizer."""
    return write_toy(tmp_path_factory.mktemp("untokenized"), None, readable)
