"""What README prints must run."""

import re
from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_python_example_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["mixed"].shape == (1, 3, 32, 32)
    assert names["strip"].shape == (3, 3, 32, 32)
    assert names["maps"].shape[-2:] == (32, 32)
    assert (tmp_path / "my-model/model.safetensors").is_file()


def test_every_command_exists():
    from typer.main import get_command

    from encdiff.cli import app

    commands = get_command(app).commands
    known = {*commands, *(f"data {name}" for name in commands["data"].commands)}
    said = re.findall(r"^encdiff ((?:data )?[a-z-]+)", README, re.MULTILINE)
    assert said and set(said) <= known


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
