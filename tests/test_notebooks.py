"""The notebooks: whole, empty of results, and running from top to bottom as they are."""

import ast
import base64
import json
import os
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
FOLDER = REPOSITORY / "colab"
NAMES = ["batch_decoding", "finetune", "quickstart"]
PICTURES = {"batch_decoding": 1, "finetune": 1, "quickstart": 1}
PNG = b"\x89PNG\r\n\x1a\n"

pytestmark = [
    pytest.mark.once,
    # Jupyter's packages warn of each other.
    pytest.mark.filterwarnings("default"),
]
every_notebook = pytest.mark.parametrize("name", NAMES)


def path(name):
    return FOLDER / f"{name}.ipynb"


def cells(name, kind):
    notebook = json.loads(path(name).read_text("utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture
def address(monkeypatch):
    """The script that says where the repository is published."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import address

    return address


def test_these_are_all_notebooks():
    assert [file.stem for file in sorted(FOLDER.glob("*.ipynb"))] == NAMES


@every_notebook
def test_results_are_left_out(name):
    for cell in cells(name, "code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), source(cell)


@every_notebook
def test_code_is_explained_before_it_comes(name):
    """Each notebook begins with its badge and title, and its code is Python without magic."""
    first, *_ = cells(name, "markdown")
    assert source(first).startswith("[![Open in Colab](")
    assert "\n# " in source(first)
    for cell in cells(name, "code"):
        ast.parse(source(cell))


def test_all_are_installed_by_the_same_cell():
    installing = {source(cells(name, "code")[0]) for name in NAMES}
    assert len(installing) == 1
    assert 'REPOSITORY = "' in installing.pop()


def test_one_address_is_written_everywhere(address):
    assert {file.stem for file in address.NOTEBOOKS} == set(NAMES)
    for file in (*address.NOTEBOOKS, *address.PAGES):
        text = file.read_text("utf-8")
        assert address.addressed(text) == text, f"run colab/address.py, for {file}"


@every_notebook
def test_badge_and_pages_open_the_notebook_on_colab(address, name):
    link = address.colab_link(path(name))
    assert f"({link})" in source(cells(name, "markdown")[0])
    assert f'REPOSITORY = "{address.REPOSITORY}"' in source(cells(name, "code")[0])
    for page in address.PAGES:
        assert f"({link})" in page.read_text("utf-8"), page


def test_another_address_reaches_every_place(address, monkeypatch):
    text = path("quickstart").read_text("utf-8")
    monkeypatch.setattr(address, "REPOSITORY", "https://github.com/some-one/else.where")
    changed = address.addressed(text)
    assert changed.count("some-one/else.where") == 2
    assert 'REPOSITORY = \\"https://github.com/some-one/else.where\\"' in changed
    assert address.colab_link(path("quickstart")) in changed


@every_notebook
def test_format_is_valid(name):
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(json.loads(path(name).read_text("utf-8")))
    identities = [cell["id"] for cell in json.loads(path(name).read_text("utf-8"))["cells"]]
    assert len(set(identities)) == len(identities)


def surroundings(tmp_path):
    """The environment of a kernel: this source tree, a CPU, and nothing of the tests' own."""
    kept = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return kept | {
        "PYTHONPATH": str(REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture
def execute(tmp_path):
    """Runs a notebook in a kernel of its own; returns its cells' outputs by the cells' ids."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")

    def execute(name):
        notebook = nbformat.read(path(name), as_version=4)
        client = nbclient.NotebookClient(
            notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
        )
        client.execute(env=surroundings(tmp_path))
        return {
            cell["id"]: cell["outputs"] for cell in notebook.cells if cell["cell_type"] == "code"
        }

    return execute


def printed(outputs):
    return "".join(output["text"] for output in outputs if output["output_type"] == "stream")


@every_notebook
def test_notebook_runs_from_top_to_bottom(execute, name, tmp_path):
    results = execute(name)
    everything = [output for outputs in results.values() for output in outputs]
    # Warnings and logs go there: that a cache is not calibrated, for one.
    assert [each["text"] for each in everything if each.get("name") == "stderr"] == []
    pictures = [
        each["data"]["image/png"] for each in everything if "image/png" in each.get("data", ())
    ]
    assert len(pictures) == PICTURES[name]
    assert all(base64.b64decode(picture).startswith(PNG) for picture in pictures)
    assert f"Python {sys.version.split()[0]}" in printed(results["install"])
    assert "installing" not in printed(results["install"])
    CHECKS[name](results)


def check_quickstart(results):
    assert "1 × cpu (cpu)" in printed(results["machine"])
    generated = printed(results["generate"])
    assert generated.startswith("[exact: ")
    assert "\n\n[h1b: " in generated
    assert printed(results["stream"]).startswith("Once upon a time")


def check_finetune(results):
    table = results["after"][0]["data"]["text/markdown"]
    (before, after) = (
        [float(row.split("|")[column]) for row in table.splitlines()[-2:]] for column in (2, 3)
    )
    assert all(late < early for early, late in zip(before, after, strict=True))
    assert ".zip: " in printed(results["export"])


def check_batch_decoding(results):
    assert printed(results["devices"]).startswith("2 × cpu")
    assert printed(results["decode"]).count("\n") >= 4
    assert printed(results["pmap"]).startswith("The king opened the door")


CHECKS = {
    "quickstart": check_quickstart,
    "finetune": check_finetune,
    "batch_decoding": check_batch_decoding,
}
