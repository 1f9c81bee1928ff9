"""The short form of `make campaign`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("part,count,said", [("kills", 4, "kills"), ("full_disk", 6, "small disks")])
def test_a_short_campaign(part, count, said):
    """At least so many cases: a run may be killed more than once before it ends."""
    command = [sys.executable, "-m", f"tests.campaign.{part}", "--count", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.stdout.startswith("left out"):
        pytest.skip(done.stdout)
    cases, _, rest = done.stdout.splitlines()[-1].partition(" ")
    assert done.returncode == 0 and rest == f"{said}, 0 failures", done.stdout + done.stderr
    assert int(cases) >= count
