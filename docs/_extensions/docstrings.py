"""Docstrings are plain text: `|x|` is a magnitude, and what is indented after a blank line is code or a formula."""

import re
from collections.abc import Iterator

from sphinx.application import Sphinx

PAGE = re.compile(r"`?docs/(\w+)\.md`?")


def literal_blocks(lines: list[str]) -> Iterator[str]:
    """The lines with `::` before every indented paragraph; in all others bars are escaped and pages become links."""
    margin, inside = 0, False  # of the last line of text; in an indented paragraph
    for before, line in zip(["", *lines], lines, strict=False):
        indent = len(line) - len(line.lstrip())
        if line.strip() and not before.strip() and not inside and indent > margin and margin == 0:
            inside = True
            yield "::"
            yield ""
        elif line.strip() and indent == 0:
            inside = False
        margin = indent if line.strip() and not inside else margin
        yield line if inside else PAGE.sub(r":doc:`docs/\1.md </\1>`", line.replace("|", "\\|"))


def as_written(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    lines[:] = literal_blocks(lines)


def is_field_of_tuple(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Fields of a NamedTuple are in its signature; Python's own docstrings of them say nothing."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before Napoleon makes sections of it
    app.connect("autodoc-skip-member", is_field_of_tuple)
    return {"parallel_read_safe": True}
