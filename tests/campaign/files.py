"""Damaged files for every reader: each ends as a value, an InputError of one line, or an OSError, within its limits.

    python -m tests.campaign.files --cases 12000

Cases are numbered: the same seed and number give the same file. Readers run in child processes with limits, so that a
signal, a hang or a hunger for memory is counted like any other outcome. Exits 1 if there was one that must not be.
"""

import argparse
import faulthandler
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from encdiff.errors import InputError

from .damage import damaged
from .readers import READERS

SECONDS, MEMORY = 20, 2**30  # of one case
FINE = ("value", "InputError", "OSError")


class Outcome(NamedTuple):
    case: int
    reader: str
    kind: str
    said: str


def reader_of(case: int) -> str:
    return list(READERS)[case % len(READERS)]


def build(whole: Path) -> None:
    """A folder of whole files for each reader, each of which its reader can read."""
    for name, reader in READERS.items():
        (whole / name).mkdir()
        reader.make(whole / name)


def write_case(seed: int, case: int, whole: Path, folder: Path) -> Path:
    """One damaged file among whole ones in `folder`; returns what the reader is to be given."""
    name, rng = reader_of(case), random.Random(f"{seed} {case}")
    reader = READERS[name]
    shutil.copytree(whole / name, folder)
    path = rng.choice(sorted(folder.glob(reader.damaged)))
    path.write_bytes(damaged(path.read_bytes(), rng))
    return folder if reader.damaged == "*" else path


def try_case(seed: int, case: int, whole: Path, folder: Path) -> tuple[str, str]:
    """What comes of one case, and what was said."""
    path = write_case(seed, case, whole, folder)
    try:
        READERS[reader_of(case)].read(path)
    except InputError as error:
        return ("InputError", str(error)) if "\n" not in str(error) else ("InputError of several lines", str(error))
    except OSError as error:
        return "OSError", str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return type(error).__name__, f"{error} at {where.filename}:{where.lineno}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return "value", ""


def work(seed: int, cases: Iterable[int], whole: Path, folder: Path, out: int) -> None:
    """In a child: the cases one after the other, a line for each; ends early once one took too much memory."""
    torch.set_num_threads(1)
    faulthandler.disable()  # pytest's: signals are counted, not told
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        kind, said = try_case(seed, case, whole, folder / str(case))
        taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if taken > MEMORY:
            kind, said = "memory", f"{taken / 2**30:.1f} GiB ({kind}: {said})"
        os.write(out, f"{case}\t{kind}\t{' '.join(said.split())[:500]}\n".encode(errors="replace"))
        if taken > MEMORY:
            return


class Child:
    """A forked process at work on some of the cases, in order."""

    def __init__(self, seed: int, cases: list[int], whole: Path, folder: Path):
        self.cases, self.since, self.rest, self.begun = cases, time.monotonic(), b"", False
        self.pipe, out = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.pipe)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1), os.dup2(silence, 2)
            try:
                work(seed, cases, whole, folder, out)
            finally:
                os._exit(0)
        os.close(out)

    def lines(self) -> list[list[str]]:
        """What it has done since; an empty list at its end."""
        content = os.read(self.pipe, 2**16)
        self.begun |= bool(content)
        *lines, self.rest = (self.rest + content).split(b"\n")
        self.since = time.monotonic()
        return [line.decode(errors="replace").split("\t") for line in lines]

    def end(self) -> str:
        """Wait for it, or kill it; how it ended."""
        late = time.monotonic() - self.since > SECONDS
        if late:
            os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.pipe)
        if late:
            return "hang"
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return "" if self.begun else "exit"  # after a case that took much memory it makes room


def campaign(cases: Iterable[int], seed: int, jobs: int = 1) -> Iterator[Outcome]:
    """The outcome of each case, as they come."""
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        whole.mkdir()
        build(whole)
        cases = list(cases)
        lanes = [cases[i::jobs] for i in range(jobs)]
        children = [Child(seed, lane, whole, Path(root)) for lane in lanes if lane]
        while children:
            ready = select.select([child.pipe for child in children], [], [], 1)[0]
            for child in list(children):
                if child.pipe in ready:
                    for line in (done := child.lines()):
                        case = child.cases.pop(0)
                        yield Outcome(case, reader_of(case), line[1], line[2])
                    if done:
                        continue
                elif time.monotonic() - child.since <= SECONDS:
                    continue
                children.remove(child)
                ended = child.end()
                if ended and child.cases:
                    case = child.cases.pop(0)
                    yield Outcome(case, reader_of(case), ended, "")
                if child.cases:
                    children.append(Child(seed, child.cases, whole, Path(root)))


def report(outcomes: list[Outcome], say: Callable[[str], None] = print) -> bool:
    """A table of counts by reader, and every outcome that must not be; whether there was none."""
    kinds = [*FINE, *sorted({o.kind for o in outcomes} - set(FINE))]
    counts = Counter((o.reader, o.kind) for o in outcomes)
    say(f"{'reader':18}" + "".join(f"{kind:>14}" for kind in kinds))
    for name in READERS:
        say(f"{name:18}" + "".join(f"{counts[name, kind]:14,}" for kind in kinds))
    say(f"{'all':18}" + "".join(f"{sum(o.kind == kind for o in outcomes):14,}" for kind in kinds))
    bad = [o for o in outcomes if o.kind not in FINE]
    for o in bad:
        say(f"case {o.case}, {o.reader}: {o.kind}: {o.said}")
    return not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=12_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--reader", choices=READERS, help="take the cases of this one only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began, outcomes = time.monotonic(), []
    cases = range(given.first, given.first + given.cases)
    cases = [case for case in cases if given.reader in (None, reader_of(case))]
    for outcome in campaign(cases, given.seed, given.jobs):
        outcomes.append(outcome)
        if len(outcomes) % 1000 == 0:
            print(f"{len(outcomes):,} cases, {time.monotonic() - began:.0f} s", flush=True)
    return 0 if report(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
