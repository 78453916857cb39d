"""Files that are whole or not there."""

from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Writes a file anew, in UTF-8; an old one stays until the new one is whole."""
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_text(text, encoding="utf-8", newline="\n")
    unfinished.replace(path)
