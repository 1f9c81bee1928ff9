"""What a release holds and says: its archives, its citation, the forms and the workflow of the hosted project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import encdiff
from tools import check_release

yaml = pytest.importorskip("yaml", reason="pyyaml is in the extra dev")

ROOT = Path(__file__).parent.parent
GITHUB = ROOT / ".github"
VERSION = encdiff.__version__


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """An sdist, and the wheel that is built from it, of a copy of the sources, where no compiler is."""
    pytest.importorskip("build.util", reason="the package `build` is in the extra dev")
    copy, empty = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("empty")
    beside = {name for name in check_release.BESIDE.split() if (ROOT / name).exists()}
    for name in check_release.sources(ROOT) | beside:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    (copy / "tests").mkdir()
    (copy / "tests/test_nothing.py").touch()  # setuptools takes tests/test*.py by itself
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(copy / "dist"), str(copy)]
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "ENCDIFF_CUDA")} | {"PATH": str(empty)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


@pytest.fixture(scope="module")
def wheel(dist) -> dict[str, bytes]:
    return check_release.read(dist / f"encdiff-{VERSION}-py3-none-any.whl")


def test_both_archives_hold_the_package_and_nothing_else(dist, wheel):
    sdist = next(dist.glob("*.tar.gz"))
    assert check_release.sdist_problems(sdist.name, check_release.read(sdist)) == []
    assert check_release.wheel_problems(f"encdiff-{VERSION}-py3-none-any.whl", wheel) == []
    for name in ("csrc/noise.cu", "kernels/adamw.py", "pretrained/quickstart/model.safetensors"):
        assert f"encdiff/{name}" in wheel


def test_what_is_wrong_with_a_wheel_is_said(wheel):
    name = f"encdiff-{VERSION}-cp311-abi3-linux_x86_64.whl"
    info = f"encdiff-{VERSION}.dist-info"
    entry_point = wheel[f"{info}/entry_points.txt"].decode().splitlines()[1]
    assert entry_point.startswith("encdiff = encdiff.cli")
    files = dict(wheel)
    del files["encdiff/csrc/noise.h"]
    files |= {"tests/test_x.py": b"", "encdiff/../up": b"", f"{info}/entry_points.txt": b"[console_scripts]\n"}
    files["encdiff/errors.py"] = f'"{ROOT}/csrc"'.encode()
    assert sorted(check_release.wheel_problems(name, files)) == sorted(
        f"{name}: {problem}"
        for problem in (
            f"no entry point {entry_point}",
            "without encdiff/_C.abi3.so",  # which its tag promises
            "without encdiff/csrc/noise.h",
            "should not hold encdiff/../up",
            "should not hold tests/test_x.py",
            "a path outside it, encdiff/../up",
            f"encdiff/errors.py names {ROOT}/",
        )
    )


def test_the_sources_are_those_of_a_checkout_without_what_it_leaves(tmp_path):
    for name in ("encdiff/a.py", "encdiff/_C.abi3.so", "encdiff/__pycache__/a.pyc", "csrc/b.h", "bench/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert check_release.sources(tmp_path) == {"encdiff/a.py", "csrc/b.h"}


def test_the_version_is_stated_once_and_repeated_rightly():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## (\S+?),", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    assert (citation["version"], newest) == (VERSION, VERSION)
    assert "version" not in check_release.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_citation_has_what_its_schema_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["cff-version"], citation["type"], citation["license"]) == ("1.2.0", "software", "MIT")
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    names = [f"{author['given-names']} {author['family-names']}" for author in paper["authors"]]
    assert names == ["Tao Yang", "Cuiling Lan", "Yan Lu", "Nanning Zheng"]
    assert paper["title"] in " ".join((ROOT / "README.md").read_text().split())


def test_the_forms_of_issues_are_whole():
    forms = {path.stem: yaml.safe_load(path.read_text()) for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml")}
    assert forms.keys() == {"bug", "feature", "question", "config"}
    for form in (forms[name] for name in ("bug", "feature", "question")):
        assert form["name"] and form["description"]
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["type"] in ("textarea", "input") and field["attributes"]["label"] for field in form["body"])


def test_a_bug_report_asks_for_what_doctor_writes():
    from typer.main import get_command

    from encdiff.cli.app import app

    text = (GITHUB / "ISSUE_TEMPLATE/bug.yml").read_text()
    (option,) = re.findall(r"`encdiff doctor (--\S+) doctor\.json`", text)
    assert option in {name for parameter in get_command(app).commands["doctor"].params for name in parameter.opts}


def test_hosted_ci_runs_what_every_machine_runs():
    workflow = yaml.safe_load((GITHUB / "workflows/ci.yml").read_text())
    assert {"push", "pull_request"} <= workflow[True].keys()  # YAML 1.1 reads `on` as true
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1] == {"run": ".ci/run"} and "permissions" not in job
    assert os.access(ROOT / ".ci/run", os.X_OK)
    python = next(step["with"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert (python["python-version"], python["cache"]) == ("3.11", "pip")
