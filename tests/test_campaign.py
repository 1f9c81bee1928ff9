"""The short form of `make campaign`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import full_disk

ROOT = Path(__file__).parent.parent


def check(code: int, out: str, err: str, count: int, said: str) -> None:
    """At least so many cases: a run may be killed more than once before it ends."""
    cases, _, rest = out.splitlines()[-1].partition(" ")
    assert code == 0 and rest == f"{said}, 0 failures", out + err
    assert int(cases) >= count


def test_kills():
    command = [sys.executable, "-m", "tests.campaign.kills", "--count", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    check(done.returncode, done.stdout, done.stderr, 4, "kills")


def test_small_disks(monkeypatch, capfd):
    """What writes is a process of its own, where the disks are mounted."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "argv", ["full_disk", "--count", "6"])
    code, (out, err) = full_disk.main(), capfd.readouterr()
    if out.startswith("left out"):
        pytest.skip(out)
    check(code, out, err, 6, "small disks")
