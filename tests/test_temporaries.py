"""Files whole or not at all, from several threads and after kills; and what a full disk says."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff
from encdiff.files import temporaries
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.files.temporaries import atomic_path, clear, is_temporary
from encdiff.profiling import trace

DEAD = 2**22 + 1  # above every system's greatest process id
HERE = temporaries._host()
OLDER = [f".a.safetensors.{DEAD}.safetensors", f".room.h5.{DEAD}.partial", f".swap-0000010.png.{DEAD}.png"]
HOLD = """
import sys, time
from encdiff.files.temporaries import atomic_path
with atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(600)
"""


def hold(path) -> subprocess.Popen:
    """A process that is in the midst of writing a file."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_threads_save_under_one_name(tmp_path):
    """Each has a file of its own; which of them comes last is open, but it is whole."""
    failed = []

    def save(value: float) -> None:
        try:
            for _ in range(15):
                save_tensors(tmp_path / "a.safetensors", {"x": torch.full((50_000,), value)})
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=save, args=(float(i),)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    tensors, _ = load_tensors(tmp_path / "a.safetensors")
    assert not failed and len(tensors["x"].unique()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path):
    process = hold(tmp_path / "a.txt")
    with atomic_path(tmp_path / "b.txt") as temporary:
        temporary.write_text("whole")
    assert len(list(tmp_path.iterdir())) == 2, "that of a living process stays"
    process.send_signal(signal.SIGKILL)
    time.sleep(0.2)  # dead, but not yet waited for
    with atomic_path(tmp_path / "b.txt") as temporary:
        temporary.write_text("again")
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]
    process.communicate()


def test_a_killed_save_leaves_nothing_that_stays(tmp_path):
    """safetensors writes under a name of its own, which it alone knows."""
    code = (
        "import sys, torch; from encdiff.files.checkpoint import save_tensors\n"
        "print('writing', flush=True)\n"
        "while True: save_tensors(sys.argv[1], {'x': torch.zeros(5_000_000)})"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    while not any(found.is_file() for found in tmp_path.glob(".*/*")):
        assert process.poll() is None
    process.kill()
    process.communicate()
    assert len(list(tmp_path.iterdir())) > 0
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", OLDER)
def test_of_earlier_versions(tmp_path, name):
    (tmp_path / name).write_text("half")
    living = tmp_path / name.replace(str(DEAD), str(os.getppid()))
    living.write_text("half")
    clear(tmp_path)
    assert list(tmp_path.iterdir()) == [living] and is_temporary(name)


def test_the_same_process_id_again(tmp_path):
    """As in a container, where the next training has the number of the one that was killed."""
    (tmp_path / f".encdiff-{os.getpid()}-1-0-{HERE}").mkdir()
    with atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("one")
        with atomic_path(tmp_path / "b.txt") as other:
            other.write_text("two")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_another_machine_may_be_writing(tmp_path):
    left = tmp_path / f".encdiff-{DEAD}-1-0-{'0' * 8}"
    left.mkdir()
    clear(tmp_path)
    assert left.is_dir()
    clear(tmp_path, alone=True)
    assert not left.exists()


@pytest.mark.parametrize(
    "name", [".bashrc", ".config.2024", ".notes.2024.txt", ".DS_Store", ".git", "a.123.a", ".tmp", "x.encdiff-1-1-1-a"]
)
def test_what_is_not_ours_stays(tmp_path, name):
    (tmp_path / name).write_text("precious")
    clear(tmp_path, alone=True)
    assert not is_temporary(name) and (tmp_path / name).read_text() == "precious"


def test_a_name_as_long_as_names_may_be(tmp_path):
    path = tmp_path / ("x" * 251 + ".txt")
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"


def test_errors_name_the_file_in_one_line(tmp_path):
    with pytest.raises(OSError) as error, atomic_path(tmp_path / "a.txt"):
        raise OSError(28, "No space\nleft on device", "/some/other")
    assert str(error.value) == f"[Errno 28] No space left on device: '{tmp_path}/a.txt'"
    with pytest.raises(FileNotFoundError, match="none/a.txt"), atomic_path(tmp_path / "none" / "a.txt"):
        pass
    assert not list(tmp_path.iterdir())


def test_every_file_is_written_by_way_of_a_temporary_one():
    """But for the build, which imports nothing of the package, and a file in a folder that is temporary as a whole."""
    package = Path(temporaries.__file__).parents[1]
    written = re.compile(r"(\S+)\.write_(?:text|bytes)\(")
    found = [(path.name, name) for path in package.rglob("*.py") for name in written.findall(path.read_text())]
    others = [(file, name) for file, name in found if name != "temporary"]
    build = {("_build.py", name) for name in ("copy", "manifest", "failure")}
    assert len(found) > 5 and set(others) == build | {("sharding.py", "INDEX)")}


@pytest.mark.parametrize("written", [None, '{"traceEvents": [{"ph": "X"}, {"ph'])
def test_a_trace_on_a_full_disk(tmp_path, monkeypatch, written):
    """Its export says nothing."""

    def export(_, path):
        if written:
            Path(path).write_text(written)

    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", export)
    with pytest.raises(OSError, match="is the disk full.*x.json"):
        trace(torch.nn.Linear(2, 2), lambda: torch.ones(2) + 1, 1, tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_the_systems_error(tmp_path, monkeypatch):
    """What torch.save raises there."""
    torch.manual_seed(0)
    model = EncDiff(TINY)

    def full(content, path):
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:672] .\nunexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="could not be written .*pos 64 vs 0.*is the disk full.*m.ckpt") as error:
        model.save_published(tmp_path / "m.ckpt")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
