"""What people read at a terminal, or in the file that they send it to: lines as they are, tables, and progress."""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import IO, cast

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127) if chr(code) != "\n"}
FIRST, EVERY = 5.0, 30.0  # seconds to the first line of progress and between the others, where there is no terminal


class _Output:
    """Standard output as it is at the moment; characters that its encoding lacks become escapes, such as \\xe9."""

    def write(self, text: str) -> int:
        stream = _stdout()
        if stream.encoding and stream.errors in (None, "strict"):  # else it has its own way with them
            text = text.encode(stream.encoding, "backslashreplace").decode(stream.encoding)
        return stream.write(text)

    def __getattr__(self, name: str):
        return getattr(_stdout(), name)


def _stdout():
    return getattr(sys.stdout, "rich_proxied_file", sys.stdout)  # while a bar is shown, rich stands in between


# no markup: names and paths hold brackets; nothing is cut or broken, that a path may be copied
console = Console(file=cast(IO[str], _Output()), markup=False, emoji=False, highlight=False, soft_wrap=True)


def plain(text: str) -> str:
    """The text with what would steer a terminal, such as the colours in a file's name, as escapes."""
    return text.translate(CONTROLS)


def say(text: str, style: str | None = None) -> None:
    """Print lines of text, paths in them included, as they are."""
    console.print(plain(text), style=style)


def say_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; where it is wider than the terminal a block for each row, lest numbers be cut."""
    widths = [max(map(cell_len, column)) for column in zip(header, *rows, strict=True)]
    if console.is_terminal and sum(widths) + 2 * len(widths) > console.width:
        for first, *others in rows:
            say("\n".join([first, *(f"  {h}: {cell}" for h, cell in zip(header[1:], others, strict=True) if cell)]))
        return
    for row in (header, *rows):
        say("  ".join(set_cell_size(cell, width) for cell, width in zip(row, widths, strict=True)).rstrip())


class Tasks:
    """Progress of tasks by name. On a terminal each has a bar, as far as it was told; elsewhere lines say how far the
    last one is: after FIRST seconds, every EVERY seconds, and at the end of each.
    """

    def __init__(self):
        self._view = _Bars() if _has_bars() else _Lines()
        self._told = time.monotonic()

    def __enter__(self) -> "Tasks":
        self._view.__enter__()
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._view.__exit__(*error)

    def __call__(self, task: str, done: int, total: int | None, note: str = "") -> None:
        self._told = time.monotonic()
        self._view.update(plain(task), done, total, note)

    @property
    def due(self) -> bool:
        """Whether a second has passed: a note that costs something is worth its price."""
        return time.monotonic() - self._told >= 1


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """One task; yields `report(done, total)`."""
    with Tasks() as tasks:
        tasks(what, 0, None)
        yield lambda done, total: tasks(what, done, total)


def _has_bars() -> bool:
    return (console.is_terminal and not console.is_dumb_terminal) or console.is_jupyter


class _Bars:
    def __init__(self):
        columns = (
            TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False), TimeElapsedColumn(), TextColumn("left"),
            TimeRemainingColumn(),
        )  # fmt: skip
        self.bars = Progress(*columns, console=console, refresh_per_second=4, speed_estimate_period=60)
        self.ids: dict = {}

    def __enter__(self) -> None:
        self.bars.start()

    def __exit__(self, *error) -> None:
        self.bars.stop()

    def update(self, task: str, done: int, total: int | None, note: str) -> None:
        if task not in self.ids:
            self.ids[task] = self.bars.add_task(task, completed=done, total=total, note=note)
        self.bars.update(self.ids[task], completed=done, total=total, note=note)


class _Lines:
    def __init__(self):
        self.lines: dict[str, _Line] = {}
        self.last: _Line | None = None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._now_and_then, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *error) -> None:
        self.ended.set()
        self.thread.join()
        for line in self.lines.values():
            if line.total and not line.ended:
                say(str(line))

    def update(self, task: str, done: int, total: int | None, note: str) -> None:
        line = self.lines.get(task)
        if line is None or (line.ended and done < line.done):  # begun, or begun again
            line = self.lines[task] = _Line(task, done)
        self.last = line
        line.done, line.total, line.note = done, total, note
        if line.total and done >= line.total and not line.ended:
            line.ended = True
            say(str(line))

    def _now_and_then(self) -> None:
        wait = FIRST
        while not self.ended.wait(wait):
            wait = EVERY
            if self.last and not self.last.ended:
                say(str(self.last))


class _Line:
    """How far a task is; what it had done when it was first told took no time."""

    def __init__(self, task: str, done: int):
        self.task, self.first, self.began, self.ended = task, done, time.monotonic(), False
        self.done, self.note = done, ""
        self.total: int | None = None

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.began
        parts = [f"{self.done:,} of {self.total:,}"] if self.total else []
        parts += [self.note] if self.note else []
        parts.append(f"{_clock(elapsed)} gone")
        if self.total and self.first < self.done < self.total:
            parts.append(f"{_clock(elapsed * (self.total - self.done) / (self.done - self.first))} left")
        return f"{self.task}: {', '.join(parts)}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
