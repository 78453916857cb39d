"""Where the repository is published, for all that has to name it: the one place that says so.

    python colab/address.py

writes it into the notebooks (their badges, and the cell that installs the library) and into the
pages that link to notebooks on Colab.
"""

import re
from pathlib import Path

REPOSITORY = "https://github.com/h1bjax/h1bjax"

ROOT = Path(__file__).parents[1]
NOTEBOOKS = tuple(sorted(Path(__file__).parent.glob("*.ipynb")))
PAGES = (ROOT / "README.md", ROOT / "docs" / "index.md")

_ON_COLAB = "https://colab.research.google.com/github/"
_IN_CELL = re.compile(r"(?<=REPOSITORY = \\\")https://[^\\\"]+")
_IN_LINK = re.compile(rf"(?<={re.escape(_ON_COLAB)})[\w.-]+/[\w.-]+(?=/blob/)")


def colab_link(notebook: Path) -> str:
    """Where Colab opens a notebook of the main branch."""
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    return f"{_ON_COLAB}{owner_and_name}/blob/main/colab/{notebook.name}"


def addressed(text: str) -> str:
    """The text of a notebook's file or of a page, with the address in its places."""
    text = _IN_CELL.sub(REPOSITORY, text)
    return _IN_LINK.sub(REPOSITORY.removeprefix("https://github.com/"), text)


def main() -> None:
    """Writes the address into all files."""
    for path in (*NOTEBOOKS, *PAGES):
        path.write_text(addressed(path.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
