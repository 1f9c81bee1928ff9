"""Every Triton kernel is checked on the user's own GPU before it is used there for the first time.

Compilers have miscompiled kernels for single cards and versions without a word. So the first call of a kernel in a
variant on a (card, Triton, kernel sources) runs it on small inputs against its formula (`_check`), some tenths of a
second, and what is wrong is a *reason* of dispatch: the next route or implementation serves. Verdicts are kept in
`$XDG_CACHE_HOME/encdiff/self-check`, which is read where a process meets a variant for the first time; past that a call
costs a look into a dictionary.

`ENCDIFF_SELF_CHECK=0` leaves it out; `encdiff doctor` checks all variants at once and replaces the verdicts.
"""

import fcntl
import hashlib
import json
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.files.reading import read_json
from encdiff.files.temporaries import atomic_path
from encdiff.ops import _build
from encdiff.ops._check import FAMILIES, Finding, Variant, check, is_lost, title
from encdiff.ops._compiling import asked_once
from encdiff.ops._triton import autocast_off

UNCHECKED = "not checked on this card yet: call it once before a graph is captured"

_known: dict[tuple, list[str]] = {}  # (device, family, variant, gradients) -> what is wrong
_said: set[str] = set()


def reasons(family: str, x: Tensor, variant: Callable[..., Variant], *args, gradients: bool = False) -> list[str]:
    """Why the kernels of a family cannot serve in `variant(*args)` where x is: they failed there.

    Under `torch.compile` sizes may be symbols, a variant may not: it is made of what the code branches on.
    """
    if not is_asked(x):
        return []
    return _reasons(family, tuple(map(_constant, variant(*args))), gradients, x.device.index or 0)


def _constant(part):
    """A part of a variant; of a compiler's symbol its value, which the code is then guarded by."""
    if isinstance(part, str):
        return part
    if isinstance(part, bool):
        return True if part else False  # noqa: SIM210 - a branch decides
    return operator.index(part)


def is_asked(x: Tensor) -> bool:
    """Whether kernels are checked where x is: on a GPU, unless they are interpreted or the user says otherwise."""
    return x.is_cuda and os.environ.get("ENCDIFF_SELF_CHECK") != "0" and os.environ.get("TRITON_INTERPRET") != "1"


@asked_once  # no graph break: a compiler gets the verdict
def _reasons(family: str, variant: Variant, gradients: bool, device: int) -> list[str]:
    key = device, family, variant, gradients
    found = _known.get(key)
    return _learn(key) if found is None else found


def _learn(key: tuple) -> list[str]:
    """The verdict kept in the user's cache, or that of a check made now and kept there."""
    device, family, variant, gradients = key
    if _known.get((device, family, variant, True)) == []:  # right with gradients is right without
        return []
    asked = os.environ.get("ENCDIFF_SELF_CHECK") or "1"
    if asked != "1":
        raise InputError(f"ENCDIFF_SELF_CHECK is {asked!r}, must be 0 or 1")
    if not is_there():
        return []
    name, kept = title(family, variant, gradients), read(device)
    wrong = kept.get(name)
    if wrong is None and kept.get(title(family, variant, True)) == []:
        wrong = []
    if wrong is None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            say(f"{name}: {UNCHECKED}")
            return [UNCHECKED]
        if not kept:
            where = f", once; verdicts are kept in {path}" if (path := file(device)) else ""
            say(f"each kernel is checked at its first use on {card(device)}{where}")
        finding = _apart(family, variant, gradients, device)
        wrong = finding.wrong
        keep(device, [finding])
        if is_lost(place(device)):
            raise RuntimeError(f"{name} broke the work on {card(device)}: {'; '.join(wrong)}. It is noted: start again")
    if wrong:
        say(f"{name} is wrong on {card(device)}: {'; '.join(wrong)}; another implementation serves")
    _known[key] = [f"it failed its check on this card: {'; '.join(wrong)}"] if wrong else []
    return _known[key]


def _apart(family: str, variant: Variant, gradients: bool, device: int) -> Finding:
    """Check where no autocast, inference mode or tracing of the caller's holds: in a thread of its own.

    But not from within a backward: there is one thread for that on a GPU, and it cannot wait for another. What the
    device had to say before is raised, and not laid to the kernel.
    """

    def run() -> Finding:
        try:
            return check(FAMILIES[family], variant, gradients, place(device))
        except torch.cuda.OutOfMemoryError:
            return Finding(family, variant, gradients, {}, ["the device is out of memory"], lasting=False)

    with _waiting_allowed(device):
        if torch._C._current_graph_task_id() != -1:
            with torch.inference_mode(False), torch.enable_grad(), autocast_off(torch.empty(0, device=place(device))):
                return run()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(run).result()


@contextmanager
def _waiting_allowed(device: int) -> Iterator[None]:
    """The check waits for the device, also where the user has it refused."""
    refused = torch.cuda.get_sync_debug_mode() if place(device).type == "cuda" else 0
    try:
        if refused:  # to set it is to be warned that it is a prototype
            torch.cuda.set_sync_debug_mode(0)
        if place(device).type == "cuda":
            torch.cuda.synchronize(device)
        yield
    finally:
        if refused:
            torch.cuda.set_sync_debug_mode(refused)


def is_there() -> bool:
    """Whether a GPU can be used: tensors may be fake ones."""
    return torch.cuda.is_available()


def place(device: int) -> torch.device:
    return torch.device("cuda", device)


@cache
def card(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (sm_{major}{minor})"


@cache
def sources() -> str:
    """What stands for the kernels and for what they are checked against."""
    import encdiff.kernels

    digest = hashlib.sha256()
    for folder in (Path(encdiff.kernels.__file__).parent, Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(device: int) -> dict[str, str]:
    import triton

    return {"card": card(device), "triton": triton.__version__, "torch": torch.__version__, "sources": sources()}


def file(device: int) -> Path | None:
    """Where the verdicts of a card are kept; None, and it is said, where they cannot be."""
    try:
        cache_folder = _build.user_cache()
    except OSError as error:
        say(f"verdicts on kernels cannot be kept ({error}): every process checks its kernels anew")
        return None
    name = "-".join(re.sub(r"[^\w.]+", "-", part).strip("-") for part in identity(device).values())
    return cache_folder / "encdiff" / "self-check" / f"{name}.json"


def read(device: int) -> dict[str, list[str]]:
    """Title of a check -> what was wrong; empty where there is no file, or one that is of no use."""
    if (path := file(device)) is None:
        return {}
    try:
        kept = read_json(path)
        checks, of = kept["checks"], {name: kept[name] for name in identity(device)}
        if not all(isinstance(wrong, list) for wrong in checks.values()):
            raise TypeError("a verdict must be a list")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        say(f"{path} cannot be used ({type(error).__name__}: {error}): kernels are checked anew")
        return {}
    if of != identity(device):
        say(f"{path} is of {of}, this is {identity(device)}: kernels are checked anew")
        return {}
    return checks


def replace(device: int, findings: Iterable[Finding]) -> None:
    """Let these verdicts count, in this process and in later ones."""
    _known.clear()
    keep(device, findings)


def keep(device: int, findings: Iterable[Finding]) -> None:
    """Add findings to the verdicts that are kept, or replace them; other processes may do so at the same time."""
    findings = [finding for finding in findings if finding.lasting]
    if not findings or (path := file(device)) is None:
        return
    try:
        with _locked(path), atomic_path(path) as temporary:
            checks = read(device) | {str(finding): finding.wrong for finding in findings}
            temporary.write_text(json.dumps(identity(device) | {"checks": checks}, indent=1))
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror or error}): every process checks its kernels anew")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def say(line: str) -> None:
    """One line on stderr, once."""
    if line not in _said:
        _said.add(line)
        print(f"encdiff: {line}", file=sys.stderr, flush=True)
