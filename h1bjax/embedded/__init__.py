"""The model that ships inside the package; its card is README.md beside this file."""

from importlib.resources import files
from pathlib import Path


def embedded_model() -> Path:
    """The folder of the model, in Hugging Face layout and calibrated for the default cache."""
    return Path(str(files(__name__)))
