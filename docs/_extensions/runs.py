"""The directive `runs`: every file that the measured runs left, to be downloaded."""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Runs(SphinxDirective):
    """A list of the folders `*/run*` beside the page, each with its files."""

    def run(self) -> list[nodes.Node]:
        here = Path(self.env.doc2path(self.env.docname)).parent
        runs = sorted(here.glob("*/run*"), reverse=True)
        return [nodes.definition_list("", *(_item(here, run) for run in runs))]


def _item(here: Path, run: Path) -> nodes.definition_list_item:
    links = nodes.paragraph()
    for file in sorted(run.iterdir()):
        link = addnodes.download_reference("", file.name, reftarget=file.relative_to(here).as_posix(), refdoc="")
        links += [link, nodes.Text(" ")]
    name = nodes.term("", "", nodes.literal("", run.relative_to(here).as_posix()))
    return nodes.definition_list_item("", name, nodes.definition("", links))


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("runs", Runs)
    return {"parallel_read_safe": True}
