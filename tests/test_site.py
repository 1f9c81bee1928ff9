"""The documentation builds without a warning, is complete, and asks nothing of another host."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

import encdiff
from encdiff import EncDiff, ops
from encdiff.models.core import EncDiffCore
from encdiff.models.edits import ConceptModel
from encdiff.models.sampling import EncDiffSampling

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

for package in ("sphinx", "myst_parser", "furo", "sphinx_design", "sphinx_copybutton"):
    pytest.importorskip(package, reason=f"the site needs {package}: pip install encdiff[docs]")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site, as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "docs", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    return out


def test_every_page_is_there(site):
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    missing = [p for p in pages if not p.match("results/*/run*/*") and not (site / p.with_suffix(".html")).is_file()]
    assert len(pages) > 30 and not missing


def test_nothing_is_asked_of_another_host(site):
    pages, sheets = ([f.read_text() for f in site.rglob(f"*.{kind}")] for kind in ("html", "css"))
    tags = [tag for page in pages for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page)]
    rules = [rule for sheet in sheets for rule in re.findall(r"(?:@import|url\()[^;)]*", sheet)]
    assert len(tags) > 100 and rules
    assert not [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag)]
    assert not [rule for rule in rules if re.match(r"""(?:@import\s*)?(?:url\()?\s*["']?(?:https?:)?//""", rule)]


def test_every_public_name_is_described(site):
    text = (site / "api/encdiff.html").read_text()
    methods = [
        name
        for part in (EncDiff, EncDiffSampling, EncDiffCore, ConceptModel)
        for name in vars(part)
        if not name.startswith("_")
    ]
    said = [name for name in encdiff.__all__ if name != "ops"] + [
        f"EncDiff.{name}" for name in methods if name != "forward"
    ]
    assert not [name for name in said if f'id="encdiff.{name}"' not in text]


def test_every_op_is_described(site):
    text = "".join((site / f"api/{page}.html").read_text() for page in ("ops", "encdiff"))
    names = [name for name in ops.__all__ if name != "OPS"]
    assert not [n for n in names if f'id="encdiff.ops.{n}"' not in text and f'id="encdiff.{n}"' not in text]


def test_every_command_is_described(site):
    text = (site / "guide/command-line.html").read_text()
    for said in ('id="encdiff-train-autoencoder"', 'id="encdiff-data-render"', "--checkpoint-activations"):
        assert said in text


def test_every_link_of_a_built_page_leads_somewhere(site):
    ids = {page: set(re.findall(r'\bid="([^"]+)"', page.read_text())) for page in site.rglob("*.html")}
    dead, seen = [], 0
    for page in ids:
        for link in re.findall(r'<a\b[^>]*\bhref="([^":]+)"', page.read_text()):
            path, _, anchor = unescape(unquote(link)).partition("#")
            target = (page.parent / path).resolve() if path else page
            seen += 1
            if not target.exists() or (anchor and target in ids and anchor not in ids[target]):
                dead.append(f"{page.relative_to(site)}: {link}")
    assert seen > 1000 and not dead
