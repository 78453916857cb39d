"""The documentation: its links lead somewhere, and its commands and names exist."""

import ast
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from urllib.parse import unquote

import pytest

from h1bjax import cli
from h1bjax.cache import PRESETS

pytestmark = pytest.mark.once

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
PAGES = {
    str(path.relative_to(REPOSITORY)): path
    for path in sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])
}
every_page = pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)

FENCE = re.compile(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SEPARATORS = ("&&", "||", ";", "|")
PACKAGES = ("h1bjax", "pallas_kernels", "train")


def blocks(page, language):
    """The fenced blocks in a language."""
    return [body for name, body in FENCE.findall(page.read_text("utf-8")) if name == language]


def prose(page):
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def spans(page):
    """Code in running text; a line break in it is a space."""
    return [" ".join(span.split()) for span in SPAN.findall(prose(page))]


def anchors(page):
    """The ids of a page's headings, as Python-Markdown makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        slug = re.sub(r"[-\s]+", "-", slug.encode("ascii", "ignore").decode())
        found.append(slug if slug not in found else f"{slug}_{found.count(slug)}")
    return found


def commands(script):
    """The words of each command in a shell script, continued lines joined."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for separator, group in groupby(words, SEPARATORS.__contains__):
            if not separator:
                found.append(list(group))
    return found


def arguments_of(words, program):
    """What follows a program wherever it stands in a command, also inside a quoted one."""
    for index, word in enumerate(words):
        if Path(word).name == program:
            return words[index + 1 :]
        if word.startswith(f"{program} "):
            return shlex.split(word)[1:]
    return None


def resolve(name):
    """The object of a dotted name; raises where there is none."""
    module, _, rest = name, "", ""
    while True:
        try:
            found = import_module(module)
            break
        except ModuleNotFoundError as error:
            if "." not in module or not f"{name}.".startswith(f"{error.name}."):
                raise
            module = module.rpartition(".")[0]
    rest = name[len(module) + 1 :]
    for part in filter(None, rest.split(".")):
        annotations = getattr(found, "__annotations__", {})
        # A field without a default is an attribute of instances only.
        found = annotations[part] if part in annotations else getattr(found, part)
    return found


def test_all_pages_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "docs/api/cache.md"} <= set(PAGES)


@every_page
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            assert target.startswith("https://"), target
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(DOCS if page.is_relative_to(DOCS) else REPOSITORY)
        if not (file.exists() and inside and (not anchor or anchor in anchors(file))):
            broken.append(target)
    assert broken == []


@every_page
def test_commands_parse(page, capsys):
    """Every `h1bjax` command is one that the program takes, and what `python` runs exists."""
    written = [words for script in blocks(page, "sh") for words in commands(script)]
    for words in written:
        parse(arguments_of(words, "h1bjax"))
    for words in map(str.split, spans(page)):
        if words[:1] == ["h1bjax"]:
            # Without options a command is only named in the text.
            options = any(word.startswith("--") for word in words)
            parse(words[1:] if options else [*words[1:], "--help"])
        written.append(words)
    for words in written:
        for program in ("python", "python3"):
            match arguments_of(words, program):
                case ["-m", "build" | "pip" | "pytest" | "venv", *_]:
                    pass
                case ["-m", module, *_]:
                    assert find_spec(module), module
                case [script, *_] if script.endswith(".py"):
                    assert (REPOSITORY / script).is_file(), script


def parse(arguments):
    """Raises ValueError if the program does not take these arguments; None is no command."""
    if arguments is None:
        return
    try:
        cli._parser().parse_args(arguments)
    except SystemExit:
        # Only --help and --version end so; mistakes are ValueErrors.
        return


@every_page
def test_python_is_valid_and_its_imports_exist(page):
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    resolve(alias.name)
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", name):
                    resolve(name)


@every_page
def test_names_in_the_text_exist(page):
    """Dotted names of this project, and what the reference is generated for."""
    dotted = rf"(?:{'|'.join(PACKAGES)})(?:\.\w+)+"
    names = re.findall(rf"^::: ({dotted})$", page.read_text("utf-8"), re.MULTILINE)
    names += [match[0] for span in spans(page) if (match := re.match(dotted, span))]
    for name in names:
        if not (REPOSITORY / name).exists():
            resolve(name)


@every_page
def test_files_in_the_text_exist(page):
    """Paths that begin with a folder of the repository."""
    folders = [path.name for path in REPOSITORY.iterdir() if path.is_dir()]
    for span in spans(page):
        first, slash, _ = span.partition("/")
        if slash and first in folders and re.fullmatch(r"[\w./-]+", span):
            assert (REPOSITORY / span).exists(), span


@every_page
def test_presets_in_the_text_exist(page):
    for span in spans(page):
        if re.fullmatch(r"(h1b|kivi)-[\w-]+", span):
            assert span in PRESETS, span


def test_every_page_of_the_site_is_in_its_contents():
    listed = re.findall(
        r"^ +- (?:[\w ]+: )?([\w/]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(), re.M
    )
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))


def test_the_table_of_presets_is_that_of_the_library(scripts):
    import presets_table

    written = presets_table.PAGE.read_text("utf-8")
    assert presets_table.page(written) == written, "run docs/presets_table.py"
    rows = presets_table.table().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(PRESETS)


def test_every_figure_is_there_and_its_bytes_are_those_of_the_library(scripts):
    import figures

    assert {path.stem for path in figures.FOLDER.iterdir()} == set(figures.FIGURES)
    for name in figures.SHOWN:
        for head_dim in (64, 128):
            parts = figures.parts(PRESETS[name], head_dim)
            assert sum(parts.values()) == PRESETS[name].bytes_per_token(head_dim)


# The checks themselves


def test_broken_links_are_found(tmp_path, monkeypatch):
    (tmp_path / "other.md").write_text("# A `code` heading, twice\n\n## Again\n\n## Again\n")
    assert anchors(tmp_path / "other.md") == ["a-code-heading-twice", "again", "again_1"]
    page = tmp_path / "page.md"
    monkeypatch.setattr("test_docs.REPOSITORY", tmp_path)
    page.write_text("[a](other.md#again_1), [b](https://x.y) and [c](#here)\n# Here\n")
    test_relative_links_lead_somewhere(page)
    for target in ("other.md#nowhere", "none.md", "#there", "../outside.md"):
        page.write_text(f"[a]({target})\n# Here\n")
        with pytest.raises(AssertionError):
            test_relative_links_lead_somewhere(page)


@pytest.mark.parametrize(
    "command",
    [
        "h1bjax generate --model M",
        "a && .venv/bin/h1bjax generate --model M --prompt P --no-such-option",
        "srun --nodes=2 \\\n    h1bjax no-such-command",
        "ssh --command \\\n 'h1bjax cache-size --model M'",
        "python -m h1bjax.no_such_module",
        "python benchmarks/no_such_file.py",
    ],
)
def test_broken_commands_are_found(tmp_path, capsys, command):
    page = tmp_path / "page.md"
    page.write_text(f"```sh\n{command}\n```\n")
    with pytest.raises((ValueError, AssertionError)):
        test_commands_parse(page, capsys)


def test_broken_names_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("see `h1bjax.cache.KVCache.init` and `h1bjax.cache.KVCache.lengths`")
    test_names_in_the_text_exist(page)
    for name in ("h1bjax.cache.KVCache.no_such", "pallas_kernels.no_such", "h1bjax.no_such()"):
        page.write_text(f"see `{name}`")
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            test_names_in_the_text_exist(page)
    page.write_text("```python\nfrom h1bjax import no_such\n```\n")
    with pytest.raises(AttributeError):
        test_python_is_valid_and_its_imports_exist(page)
