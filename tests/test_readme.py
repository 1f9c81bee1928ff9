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

    from encdiff.cli.app import app

    commands = get_command(app).commands
    known = {*commands, *(f"data {name}" for name in commands["data"].commands)}
    said = re.findall(r"^encdiff ((?:data )?[a-z-]+)", README, re.MULTILINE)
    assert said and set(said) <= known


def test_every_option_in_a_document_is_one_of_its_command():
    from typer.main import get_command

    from encdiff.cli.app import app

    commands = get_command(app).commands
    commands |= {f"data {name}": command for name, command in commands["data"].commands.items()}
    documents = [README, *(path.read_text() for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md")))]
    said = [
        line
        for text in documents
        for line in re.findall(r"(?:^|`)encdiff ((?:.|\\\n)*?)(?:`|#|\n|$)", text, re.MULTILINE)
    ]
    checked = 0
    for line in said:
        name = next((n for n in sorted(commands, key=len, reverse=True) if f"{line} ".startswith(f"{n} ")), None)
        for option in re.findall(r"(?<= )--[a-z-]+", line) if name else ():
            known = [o for p in commands[name].params for o in (*p.opts, *p.secondary_opts)]
            assert option in [*known, "--help"], f"encdiff {line}"
            checked += 1
    assert checked > 30


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
