"""Fixtures that every test file may use."""

from pathlib import Path

import pytest


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
