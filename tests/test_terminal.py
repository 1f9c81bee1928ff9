"""What is printed: paths as they are, wherever they are printed to; progress with and without a terminal; help."""

import os
import pty
import re
import subprocess
import sys
import time
import typing
from enum import EnumType

import pytest
import typer.main
from PIL import Image

from encdiff import terminal
from encdiff.cli import app as cli
from encdiff.data import open_dataset
from encdiff.evaluation import stages
from encdiff.models import EncDiff
from encdiff.terminal import Tasks, progress_bar, say, say_table

NAMES = ["a[bold]b", "x[/red]y", "[link=z]", ":smile:", "back\\[slash", "two  blanks", "ü€", "b\udce9", "long " * 40]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR", "COLUMNS")}
DATA = "procedural:2,2,2,2,2,2"


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=ENVIRONMENT | environment, capture_output=True, timeout=120, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_printed_as_it_is(name, capsys):
    say(f"picture: /tmp/{name}/x.png")
    printed = capsys.readouterr().out
    assert printed == f"picture: /tmp/{name}/x.png\n".replace("\udce9", "\\udce9")


def test_a_name_does_not_steer_the_terminal(capsys, monkeypatch, tmp_path):
    name = "a\x1b[31mred\rb\x07"
    shown = "a\\x1b[31mred\\x0db\\x07"
    say(name)
    monkeypatch.setattr(sys, "argv", ["encdiff", "data", "info", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        cli.main()
    printed = capsys.readouterr()
    assert printed.out == shown + "\n" and printed.err.startswith("error: ") and "\x1b" not in printed.err


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_a_table_or_a_bar_is_no_markup(name, capsys):
    say_table(("factor", "values"), [[name, "3"]])
    with progress_bar(name) as report:
        report(1, 2)
    printed = capsys.readouterr().out
    assert printed.count(name.replace("\udce9", "\\udce9").rstrip()) == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8", "utf-8:surrogateescape"])
def test_any_encoding_prints_any_name(encoding):
    code = f"from encdiff.terminal import *\nfor name in {NAMES!r}:\n    say(name)\n    say_table([name], [[name]])"
    done = python(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    shown = {"ascii": b"\\xfc\\u20ac", "latin-1": b"\xfc\\u20ac"}.get(encoding, "ü€".encode())
    assert shown in done.stdout and (b"b\xe9" if "escape" in encoding else b"b\\udce9") in done.stdout


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_commands_where_only_ascii_is_shown(tmp_path, variables):
    folder = tmp_path / "Bilder ü [red]"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "é.png")
    command = [sys.executable, "-m", "encdiff", "data", "info", folder, "--image-size", "8"]
    done = subprocess.run(command, env=ENVIRONMENT | variables, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0 and b"[red]: 1 images of 8x8" in done.stdout, done.stderr
    done = subprocess.run(
        [*command[:-1], "9999999", "x"], env=ENVIRONMENT | variables, capture_output=True, check=False
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_commands_print_whole_paths(tmp_path, monkeypatch, capsys):
    """A run with brackets in its name: trained, evaluated and drawn, each path on one line."""
    run = tmp_path / "x[/red]y" / ("[bold] :smile: " + "long " * 20).strip()
    for args in (
        ["train", "--data", DATA, "--batch-size", "2", "--steps", "1", "--run", run],
        ["evaluate", run, "--protocol", "quick", "--metrics", "mig,factor_vae", "--no-baseline"],
        ["swap", run, "--steps", "1", "--pairs", "1"],
        ["data", "render", run.parent / "[i].h5", "--image-size", "8", "--grid", "1,1,1,1,1,1"],
        ["train", "--resume", "--run", run],
    ):
        monkeypatch.setattr(sys, "argv", ["encdiff", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code in (None, 0), capsys.readouterr()
    printed = capsys.readouterr().out.splitlines()
    for line in (f"model: {run}/model", f"scores: {run}/metrics.json", f"picture: {run}/pictures/swap.png"):
        assert line in printed
    assert f"1 images: {run.parent}/[i].h5" in printed and f"{run}: is at its last step already" in printed


# ---- progress


def test_lines_after_a_while_now_and_then_and_at_the_end(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "FIRST", 0.2)
    monkeypatch.setattr(terminal, "EVERY", 0.4)
    with Tasks() as tasks:
        tasks("training", 100, 1000)
        time.sleep(0.3)
        tasks("training", 200, 1000, "loss 0.5")
        first = capsys.readouterr().out
        time.sleep(0.4)
        second = capsys.readouterr().out
        tasks("training", 1000, 1000, "loss 0.1")
        assert capsys.readouterr().out == "training: 1,000 of 1,000, loss 0.1, 0:00:01 gone\n"
    assert first == "training: 100 of 1,000, 0:00:00 gone\n"
    assert re.fullmatch(r"training: 200 of 1,000, loss 0.5, 0:00:01 gone, 0:00:0[3-8] left\n", second)
    assert capsys.readouterr().out == ""


def test_lines_of_an_early_end_and_of_a_second_round(capsys):
    with pytest.raises(KeyError), progress_bar("sampling") as report:
        report(3, 9)
        raise KeyError
    assert capsys.readouterr().out.startswith("sampling: 3 of 9, ")
    with stages("trained") as report:
        for done in (0, 1, 0, 1):  # two seeds
            report("factor_vae", done, 1)
    assert capsys.readouterr().out.count("trained: factor vae: 1 of 1") == 2


def test_a_task_that_says_nothing_yet_is_named(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "FIRST", 0.1)
    with progress_bar("opening"):
        time.sleep(0.2)
    assert capsys.readouterr().out == "opening: 0:00:00 gone\n"


def test_training_says_its_loss_before_the_first_row_of_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "FIRST", 0.3)
    monkeypatch.setattr(terminal, "EVERY", 0.3)
    monkeypatch.setattr(Tasks, "due", True)
    from encdiff.training import TrainConfig, train

    model = EncDiff.from_preset("quickstart")
    train(
        model,
        open_dataset(DATA, 32),
        tmp_path / "run",
        TrainConfig(steps=3, batch_size=2),
        on_step=lambda _: time.sleep(0.4),
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training: ")]
    assert any(re.match(r"training: [12] of 3, loss \d\.\d{4}, [\d,]+ images/s, ", line) for line in lines)
    assert lines[-1].startswith("training: 3 of 3, loss ") and not any("nan" in line for line in lines)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
@pytest.mark.parametrize("kind", ["xterm", "dumb"])
def test_bars_on_terminals_of_any_encoding(encoding, kind):
    """Bars, and lines above them; a terminal that cannot move its cursor gets lines alone."""
    code = (
        "from encdiff.terminal import *\nwith Tasks() as t:\n t('é[/red]', 0, 2, 'loss [b]')\n say('é[/red] above')\n"
        " t('é[/red]', 2, 2)"
    )
    master, slave = pty.openpty()
    environment = ENVIRONMENT | {"PYTHONIOENCODING": encoding, "TERM": kind}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    assert process.wait(60) == 0, shown
    os.close(master)
    name = "é[/red]".encode(encoding, "backslashreplace")
    assert name + b" above" in shown and (b"2/2" if kind == "xterm" else b"2 of 2") in shown


# ---- tables and help


def test_a_table_that_does_not_fit_becomes_blocks(monkeypatch, capsys):
    header = ["ablation", *(f"score {i}" for i in range(12))]
    rows = [[name, *(f"0.{i:03} (0.111 to 0.999)" for i in range(12))] for name in ("one", "two")]
    say_table(header, rows)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all(cell in lines[1] for cell in rows[0])
    monkeypatch.setattr(type(terminal.console), "is_terminal", True)
    monkeypatch.setattr(type(terminal.console), "width", 80)
    say_table(header, rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["one", "  score 0: 0.000 (0.111 to 0.999)"] and len(lines) == 26


def commands(group, path=()):
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_at_80_columns(path, monkeypatch, capsys):
    """Every name, choice and default whole; what is left out has a default that is said."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["encdiff", *path, "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    text = capsys.readouterr().out
    text.encode("ascii")
    whole = re.sub(
        r", \.\.\.|\[ARGS\]\.\.\.|{\w+}\.\.\.|^  \w+\.\.\. <list", "", text, flags=re.M
    )  # not cut: there may be more
    assert max(map(len, text.splitlines())) <= 80 and "..." not in whole
    hints = typing.get_type_hints(COMMANDS[path].callback or dict)
    enums = {
        name: [t for t in (hint, *typing.get_args(hint)) if isinstance(t, EnumType)] for name, hint in hints.items()
    }
    choices = {name: [choice.value for enum in found for choice in enum] for name, found in enums.items()}
    entries = re.split(r"\n  (?=-)", text)
    for option in COMMANDS[path].params:
        names = [*option.opts, *option.secondary_opts]
        if not names[0].startswith("-") or "--help" in names:
            continue
        entry = next(e for e in entries if e.startswith(names[0]))
        assert all(name in entry for name in names)
        assert all(choice in entry for choice in choices[option.name])
        off = option.is_flag and not option.secondary_opts
        assert off or re.search(r"efault:\s", entry) or "[required]" in entry, (
            f"{names[0]} has a default that its help does not say"
        )
        if isinstance(option.default, str):
            assert option.default in entry
