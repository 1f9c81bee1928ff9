"""The documentation builds without a warning, is complete, and asks nothing of another host."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import encdiff

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
    tags = [tag for page in site.rglob("*.html") for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())]
    styles = [rule for sheet in site.rglob("*.css") for rule in re.findall(r"url\([^)]*\)|@import[^;]*", sheet.read_text())]
    assert len(tags) > 100
    assert not [said for said in tags + styles if re.search(r"""(?:=|\(|@import)\s*["']?(?:https?:)?//""", said)]


def test_every_public_name_is_described(site):
    text = (site / "api/encdiff.html").read_text()
    assert not [name for name in encdiff.__all__ if f'id="encdiff.{name}"' not in text and name != "ops"]


def test_every_command_is_described(site):
    text = (site / "guide/command-line.html").read_text()
    for said in ("encdiff-train-autoencoder", "encdiff-data-render"):
        assert f'id="{said}"' in text
    assert "--checkpoint-activations" in text
