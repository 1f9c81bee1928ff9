"""Files that appear whole or not at all: written in a temporary folder beside their place, then moved there.

What a killed process leaves is known by its name, `.encdiff-PID-THREAD-COUNT-HOST`, and removed when something is next
written there. A folder, since libraries write under names of their own: safetensors under `.tmpXXXXXX`.
"""

import errno
import itertools
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from zlib import crc32

_FORM = re.compile(r"\.encdiff-(?P<pid>[0-9]+)-[0-9]+-[0-9]+-(?P<host>[0-9a-f]{8})")
# What early versions left: `.NAME.SUFFIX.PID.SUFFIX`, `.NAME.PID.partial`, and safetensors' own.
_OLDER = re.compile(r"\..+(?P<suffix>\.[^.]+)\.(?P<pid>[0-9]+)((?P=suffix)|\.partial)", re.S)
_SAFETENSORS = re.compile(r"\.tmp[0-9A-Za-z]{6}")

_count = itertools.count()
_writing: set[str] = set()  # by this process, now


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path that replaces `path` when the block succeeds and vanishes when it does not.

    It has the same name, and is of this call alone. OSErrors of the block are raised in one line that names `path`.
    """
    path = Path(path)
    clear(path.parent)
    folder = path.with_name(f".encdiff-{os.getpid()}-{threading.get_native_id()}-{next(_count)}-{_host()}")
    _writing.add(folder.name)
    try:
        with errors_of(path):
            folder.mkdir()
            yield folder / path.name
            os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _writing.discard(folder.name)


@contextmanager
def errors_of(path: str | Path) -> Iterator[None]:
    """OSErrors of the block in one line that names `path`, the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise OSError(f"{path}: {_one_line(error)}") from error
        raise OSError(error.errno, _one_line(error.strerror), str(path)) from error


@contextmanager
def disk_errors(*kinds: type[Exception]) -> Iterator[None]:
    """What a library raises where it cannot write, as the OSError that it is."""
    try:
        yield
    except kinds as error:
        raise OSError(errno.EIO, f"could not be written ({_one_line(error)}); is the disk full?") from None


def is_temporary(name: str) -> bool:
    """Whether a file or folder of this name is a temporary one of this package, of whatever process."""
    return any(form.fullmatch(name) for form in (_FORM, _OLDER, _SAFETENSORS))


def clear(folder: Path, alone: bool = False) -> None:
    """Remove from a folder what killed processes left there.

    alone: nothing else writes there, so what cannot be told to be dead is removed, too: of other machines, or without
    a process in its name.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if entry.name.startswith(".")]:
            if is_temporary(name) and not _is_written(name, alone):
                _remove(folder / name)


def _remove(path: Path) -> None:
    """Delete a file or a whole folder, if it is there and that is allowed."""
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_written(name: str, alone: bool) -> bool:
    form = _FORM.fullmatch(name)
    found = form or _OLDER.fullmatch(name)
    if not found or (form and form["host"] != _host()):
        return not alone
    pid = int(found["pid"])
    return name in _writing if pid == os.getpid() else _is_alive(pid)  # a container gives the next process the same pid


def _host() -> str:
    return f"{crc32(socket.gethostname().encode()):08x}"


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"  # killed, not waited for
    except OSError:  # not on macOS
        return True


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
