"""The directive `commands`: the reference of the command line, from the commands themselves."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

from encdiff.cli.app import app


class Commands(SphinxDirective):
    """A section for each command: what it does, its arguments and options with their defaults."""

    def run(self) -> list[nodes.Node]:
        root = get_command(app)
        return [self._section(context) for context in leaves(root.context_class(root, info_name="encdiff"))]

    def _section(self, context: Any) -> nodes.section:
        command, name = context.command, context.command_path
        section = nodes.section("", nodes.title("", "", nodes.literal("", name)), names=[name])
        self.state.document.note_explicit_target(section)  # gives it the id that a link names
        section += nodes.literal_block("", f"{name} {' '.join(command.collect_usage_pieces(context))}", language="text")
        section += [_paragraph(part, self.env.docname) for part in command.help.split("\n\n")]
        records = [parameter.get_help_record(context) for parameter in command.params]
        section += nodes.definition_list("", *(_item(*record, self.env.docname) for record in records if record))
        return section


def _item(spelling: str, meaning: str, docname: str) -> nodes.definition_list_item:
    term = nodes.term("", "", nodes.literal("", spelling))
    return nodes.definition_list_item("", term, nodes.definition("", _paragraph(meaning, docname)))


def _paragraph(text: str, docname: str) -> nodes.paragraph:
    """Text in which options are code and pages of the site are links, as seen from the page `docname`."""
    paragraph = nodes.paragraph()
    for part in re.split(r"(--[a-z-]+|docs/\w+\.md)", " ".join(text.split())):
        if part.startswith("--"):
            paragraph += nodes.literal("", part)
        elif part.startswith("docs/"):
            page = {"refdomain": "std", "reftype": "doc", "reftarget": f"/{Path(part).stem}", "refexplicit": True}
            paragraph += addnodes.pending_xref("", nodes.inline("", part), refdoc=docname, refwarn=True, **page)
        else:
            paragraph += nodes.Text(part)
    return paragraph


def leaves(context: Any) -> Iterator[Any]:
    """The context of every command that does something, in the order of --help."""
    for name, command in getattr(context.command, "commands", {}).items():
        below = command.context_class(command, parent=context, info_name=name)
        yield from leaves(below) if hasattr(command, "commands") else [below]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("commands", Commands)
    return {"parallel_read_safe": True}
