"""What every reader asks of a file before it believes it: that it is one, and declares no more than it holds."""

import errno
import json
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from encdiff.errors import InputError

JSON_BYTES, JSON_DEPTH, JSON_DIGITS = 2**24, 32, 20  # far above what is ever written
OTHERS = {stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}


def refuse_special(path: str | Path) -> None:
    """InputError for a FIFO, device or socket, whose opening may wait for ever; OSError for what is not there."""
    mode = Path(path).stat().st_mode
    for test, name in OTHERS.items():
        if test(mode):
            raise InputError(f"{path}: is {name}, must be a file or a folder")


@contextmanager
def damage(said: str) -> Iterator[None]:
    """What libraries raise on a damaged file, many kinds by kind of damage, as an InputError that begins with `said`.

    Other OSErrors with a number are the system's own and stay as they are; the block must hold calls to libraries only.
    """
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place that cannot be
            raise
        raise InputError(f"{said} ({type(error).__name__}: {str(error)[:300]}); copy it again") from error


def read_bytes(path: str | Path, most: int) -> bytes:
    """The content of a file of at most so many bytes; InputError for a greater one and for what is no file."""
    path = Path(path)
    refuse_special(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path}: holds more than {most} bytes; is it another file?")
    return content


def read_text(path: str | Path, most: int) -> str:
    """The text of a file, in UTF-8 with or without a byte order mark; bytes that are none become U+FFFD."""
    return read_bytes(path, most).decode("utf-8-sig", errors="replace")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; errors as `parse_json`."""
    return parse_json(read_bytes(path, JSON_BYTES), path)


def parse_json(content: bytes, source: str | Path) -> Any:
    """What a JSON text holds.

    InputError, in one line that names `source`, for any other text, NaN and infinities, integers of more than 20
    digits, a name twice in one object, and nesting beyond 32.
    """
    try:
        text = content.decode("utf-8-sig")
        _check_depth(text)
        return json.loads(
            text, parse_int=_integer, parse_float=_number, parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not JSON ({error})") from None


def whole_number(text: Any, most: int = 2**53) -> int | None:
    """The number that a text of ASCII digits alone stands for, if it is at most `most`; None for anything else."""
    found = isinstance(text, str) and re.fullmatch(r"[0-9]{1,20}", text) and int(text) <= most
    return int(text) if found else None


def _check_depth(text: str) -> None:
    depth = 0
    for bracket in re.findall(r'[\[{]|[\]}]|"(?:[^"\\]|\\.)*+"?', text):
        depth += (bracket in "[{") - (bracket in "]}")
        if depth > JSON_DEPTH:
            raise ValueError(f"nested deeper than {JSON_DEPTH}")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > JSON_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    if abs(value := float(text)) == float("inf"):
        raise ValueError(f"{text[:JSON_DIGITS]} is too large")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)[:80]!r} stands there twice")
    return found
