"""What the documents print must run: README, CONTRIBUTING and every page of the site."""

import doctest
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_command

from encdiff.cli.app import app

MarkdownIt = pytest.importorskip("markdown_it", reason="rich or myst-parser bring it").MarkdownIt

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "encdiff/pretrained").glob("*/README.md")),
    *sorted((ROOT / "examples").glob("*.md")),
]
LANGUAGES = ("python", "pycon", "bash", "text")
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_page = pytest.mark.parametrize("path", PAGES, ids=name)


class Block(NamedTuple):
    """A fenced block: its language, what else its first line says, its text, and where it begins in the page."""

    language: str
    said: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    """The page's fenced blocks but for Sphinx's directives."""
    fences = [t for t in MarkdownIt().parse(path.read_text()) if t.type == "fence" and not t.info.startswith("{")]
    return [Block(*t.info.partition(" ")[::2], t.content, t.map[0] + 1) for t in fences]


def command_lines(path: Path) -> Iterator[str]:
    """The lines of the page's bash blocks without their comments; what is continued, or quoted, is one line."""
    for block in blocks(path):
        if block.language == "bash":
            text = re.sub(r"<<'?(\w+)'?\n.*?^\1$", "", block.text, flags=re.DOTALL | re.MULTILINE)  # another program's
            begun = ""
            for line in text.replace("\\\n", " ").splitlines():
                try:
                    yield " ".join(shlex.split(begun + line, comments=True))
                    begun = ""
                except ValueError:  # a quotation that goes on
                    begun += line + " "


def words_for_encdiff(line: str) -> list[str] | None:
    """What a line of the shell gives to `encdiff`, also one that a variable holds; None if nothing is."""
    words = line.split()
    at = next((i for i, word in enumerate(words) if word.rsplit("/", 1)[-1] == "encdiff"), None)
    return None if at is None else words[at + 1 :]


def find_command(words: list[str]):
    """The command that the words name, and those that are left for it."""
    command = get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands"):
        assert not words or words[0].startswith("-") or words[0].isupper(), f"no command: {words[0]}"
    return command, words


def check_options(words: list[str]) -> int:
    """That the command has every option among the words, and how many these are."""
    command, words = find_command(words)
    known = {option for p in command.params for option in (*p.opts, *p.secondary_opts)} | {"--help"}
    options = [word for word in words if word.startswith("--")]
    assert set(options) <= known, f"no options: {set(options) - known}"
    return len(options)


@every_page
def test_every_block_says_what_it_is(path):
    for block in blocks(path):
        where = f"{path.name}:{block.line}: {block.language} {block.said}"
        assert block.language in LANGUAGES, f"{where}: must be one of {LANGUAGES}"
        if block.said:
            assert block.language == "python", f"{where}: only python may say more"
            assert re.fullmatch(r"not run: \S+( \S+){2,}", block.said), f"{where}: must say `not run: ` and the reason"


SHAPES = re.compile(r"^(\w+) = .*  # (?:.*: )?\((\d+(?:, \d+)*)\)", re.MULTILINE)  # what a comment says of a name
WITH_EXAMPLES = [path for path in PAGES if {"python", "pycon"} & {block.language for block in blocks(path)}]


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=name)
def test_the_examples_run_as_printed(path, tmp_path, monkeypatch):
    """A page's examples run in order, in an empty folder, and share their names, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # a reader's shell has none
    names: dict = {}
    for block in blocks(path):
        if block.language == "python" and not block.said:
            exec(compile("\n" * block.line + block.text, path, "exec"), names)  # errors name the page and its line
            for name, shape in SHAPES.findall(block.text):
                assert ", ".join(map(str, names[name].shape)) == shape, f"{path.name}: the shape of {name}"
        elif block.language == "pycon":
            test = doctest.DocTestParser().get_doctest(block.text, names, path.name, str(path), block.line)
            assert test.examples, f"{path.name}:{block.line}: no line begins with >>>"
            complaints: list[str] = []
            doctest.DocTestRunner().run(test, out=complaints.append, clear_globs=False)
            assert not complaints, "".join(complaints)
            names = test.globs


@every_page
def test_every_command_is_one(path):
    for line in command_lines(path):
        if (words := words_for_encdiff(line)) is not None:
            check_options(words)
            command, rest = find_command(words)
            if not hasattr(command, "commands") and "--help" not in rest:
                command.make_context("encdiff", rest)  # reads the arguments, types and choices too; runs nothing
        for target in re.findall(r"(?:^|\s)make (?:[A-Z]+=\S+ )*([a-z]+)", line):
            assert target in TARGETS, line
        for module in re.findall(r"-m ((?:encdiff|bench|tests)[\w.]*)", line):
            assert importlib.util.find_spec(module), line


@every_page
def test_every_command_in_a_sentence_has_its_options(path):
    for token in MarkdownIt().parse(path.read_text()):
        for code in [child.content for child in token.children or () if child.type == "code_inline"]:
            if code.startswith("encdiff "):
                check_options(code.split()[1:])


def test_commands_and_options_are_found():
    """That the tests above look at something, and can fail."""
    assert sum(check_options(w) for p in PAGES for line in command_lines(p) if (w := words_for_encdiff(line))) > 50
    with pytest.raises(AssertionError):
        check_options(["data", "render", "--imagesize", "32"])
    with pytest.raises(AssertionError):
        check_options(["data", "rander", "room.h5"])
    assert words_for_encdiff("STEP=python -m encdiff profile --nvtx") == ["profile", "--nvtx"]


def anchors(path: Path) -> set[str]:
    """Those of the page's headings, as GitHub and the site make them."""
    tokens = MarkdownIt().parse(path.read_text())
    titles = [line.content for head, line in zip(tokens, tokens[1:], strict=False) if head.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_every_link_leads_somewhere(path):
    tokens = [child for token in MarkdownIt().parse(path.read_text()) for child in token.children or ()]
    for target in [t.attrs.get("href") or t.attrs.get("src") for t in tokens if t.type in ("link_open", "image")]:
        if not target.startswith(("http:", "https:")):
            file, _, anchor = target.partition("#")
            assert (path.parent / file).exists(), target
            assert not anchor or anchor in anchors(path.parent / file if file else path), target


def test_every_document_that_the_code_names_is_there():
    files = [f for room in ("encdiff", "bench", "tests", "csrc", "examples") for f in (ROOT / room).rglob("*.[pch]*")]
    texts = [f.read_text() for f in files if f.suffix in {".py", ".cpp", ".cu", ".h"}]
    named = {place for text in texts for place in re.findall(r"\bdocs/[\w/-]+(?:\.\w+)?", text)}
    assert len(named) > 5
    assert not [place for place in named if not (ROOT / place).exists()]
