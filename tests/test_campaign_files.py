"""A short form of `python -m tests.campaign.files`, and that it counts what it must count."""

import os
import random
import signal
import time

import pytest

from encdiff.errors import InputError

pytest.importorskip("lmdb", reason="the optional package lmdb is not installed")

from campaign import files
from campaign.damage import damaged
from campaign.readers import READERS, Reader


def test_damaged_files_end_as_a_value_or_one_line():
    outcomes = list(files.campaign(range(240), seed=7))
    said = []
    assert sorted(o.case for o in outcomes) == list(range(240))
    assert files.report(outcomes, said.append), "\n".join(said)
    assert {o.reader for o in outcomes if o.kind == "InputError"} == set(READERS)


def test_whole_files_are_read(tmp_path):
    files.build(tmp_path)
    for name, reader in READERS.items():
        for path in [tmp_path / name] if reader.damaged == "*" else (tmp_path / name).glob(reader.damaged):
            reader.read(path)


def fill(_) -> None:
    held = b"x" * 2**28
    assert held


def lines(_) -> None:
    error = InputError("x")
    error.args = ("one\ntwo",)
    raise error


BAD = {
    "TypeError": lambda _: len(3),
    "SIGSEGV": lambda _: os.kill(os.getpid(), signal.SIGSEGV),
    "hang": lambda _: time.sleep(60),
    "memory": fill,
    "InputError of several lines": lines,
    "exit": lambda _: os._exit(0),
    "value": lambda _: 1,
}


@pytest.mark.parametrize("kind", BAD)
def test_what_must_not_be_is_counted(monkeypatch, kind):
    monkeypatch.setattr(files, "READERS", {"x": Reader(lambda folder: (folder / "a").write_bytes(b"0"), BAD[kind])})
    monkeypatch.setattr(files, "SECONDS", 1 if kind == "hang" else 60)
    monkeypatch.setattr(files, "MEMORY", 2**27)
    outcomes = list(files.campaign(range(2), seed=0))
    assert [o.kind for o in outcomes] == [kind] * 2
    assert files.report(outcomes, lambda _: None) == (kind == "value")


def test_a_case_is_always_the_same():
    content = bytes(range(256)) * 40
    assert damaged(content, random.Random("0 5")) == damaged(content, random.Random("0 5"))
    assert len({damaged(content, random.Random(i)) for i in range(100)}) > 80
