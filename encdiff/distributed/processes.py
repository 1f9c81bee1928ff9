"""The processes of one launch: who this one is, and what they tell each other."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from encdiff.distributed.launch import end_with_launcher, launched
from encdiff.distributed.meeting import meet
from encdiff.errors import InputError, Lost, Stopped, Told
from encdiff.terminal import console

T = TypeVar("T")

SECONDS = 60.0  # until a process that the others wait for in a step counts as lost; ENCDIFF_TIMEOUT: others
PATIENCE = timedelta(days=7)  # for what the first process does alone: who dies meanwhile, its launcher notices


class Processes:
    """All processes that work as one; by itself one alone, for which every method is the work itself.

    Args:
        rank, size: which of how many; `first` is the one that writes and prints.
        local_rank, local_size: of those of this machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1):
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self._store: Any = None  # what all can write to and read
        self._waiting: Any = None  # the group in which they wait for one another, on CPUs and for as long as it takes

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def machine(self) -> int:
        """Of this process, counted from 0."""
        return self.rank // self.local_size

    def mean_(self, tensor: Tensor) -> None:
        """The tensor in place as the mean of all processes'; takes part in a captured CUDA graph."""
        if self.size > 1:
            with _watched():
                dist.all_reduce(tensor.div_(self.size))

    def mean_all_(self, tensors: list[Tensor]) -> None:
        """As `mean_` of each tensor, all of one dtype, by one exchange."""
        if self.size > 1:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            self.mean_(flat)
            parts = flat.split([tensor.numel() for tensor in tensors])
            torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])

    def stacked(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, which have one shape, by rank: (size, ...); takes part in a captured graph."""
        if self.size == 1:
            return tensor[None]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        with _watched():
            dist.all_gather(found, tensor)
        return torch.stack(found)

    def from_first(self, tensors: list[Tensor]) -> None:
        """Each tensor in place as the first process has it."""
        if self.size > 1:
            for tensor in tensors:
                held = tensor.detach().cpu().contiguous()
                with _watched():
                    dist.broadcast(held, 0, group=self._waiting)
                if not self.first:
                    tensor.detach().copy_(held)

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank: anything that pickles, small."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _watched():
            dist.all_gather_object(values, value, group=self._waiting)
        return values

    def concatenated(self, rows: np.ndarray) -> np.ndarray:
        """The rows (n, ...) of all processes, one rank's behind the other's; some may have none."""
        if self.size == 1:
            return rows
        parts = []
        for rank, (shape, dtype) in enumerate(self.gather((rows.shape, rows.dtype.str))):
            part = torch.from_numpy(np.ascontiguousarray(rows) if rank == self.rank else np.empty(shape, dtype))
            if part.numel():
                with _watched():
                    dist.broadcast(part, rank, group=self._waiting)
                parts.append(part.numpy())
        return np.concatenate(parts) if parts else rows

    def part(self, count: int, multiple: int = 1) -> tuple[int, int]:
        """Where this process's part of so many rows begins and ends, each part at a multiple, as equal as can be."""
        blocks = -(-count // multiple)
        start, stop = (min(blocks * (self.rank + i) // self.size * multiple, count) for i in (0, 1))
        return start, stop

    def together(self, work: Callable[[], T]) -> T:
        """`work()` in every process; where it fails in one for a reason that a user can mend, it fails in all."""
        if self.size == 1:
            return work()
        outcome, failed = _attempt(work)
        for rank, error in enumerate(self.gather(failed)):
            if error is not None:
                raise _retold(error, rank)
        return outcome  # type: ignore[return-value]  # where nothing failed

    def by_first(self, work: Callable[[], T]) -> T:
        """What `work()` gives in the first process, which alone does it while the others wait; pickled, so small."""
        if self.size == 1:
            return work()
        told: list[Any] = [_attempt(work) if self.first else None]
        with _watched():
            dist.broadcast_object_list(told, 0, group=self._waiting)
        outcome, error = told[0]
        if error is not None:
            raise _retold(error, 0)
        return outcome

    def same(self, **values: Any) -> None:
        """InputError, in all, for the first value that is not the same in every process."""
        for rank, others in enumerate(everywhere := self.gather(values)):
            for name, first in everywhere[0].items():
                if others.get(name) != first:
                    raise Told(f"{name} is {first!r} in process 0, but {others.get(name)!r} in process {rank}")

    def says(self, error: Exception) -> bool:
        """Whether it is this process that tells the user of an error: of one that several meet, the first that asks."""
        if self.size == 1:
            return True
        if isinstance(error, Told) or self._store is None:  # not even met
            return self.first
        try:
            said = self._store.add("said", 1) == 1  # who is lost may have been, for a reason that it tells
            return said if isinstance(error, Lost) else self._store.add(f"said {error}", 1) == 1
        except (dist.DistError, RuntimeError):  # the store ended with the process that kept it
            return True

    def device(self, wanted: torch.device) -> str:
        """The device of this process, of those of its machine; InputError where several would take one GPU."""
        if self.size == 1 or wanted.type != "cuda":
            return str(wanted)
        if wanted.index is not None:
            raise InputError(f"--device {wanted}: is one GPU for {self.size} processes; take cuda, for one each")
        if self.local_size > (there := torch.cuda.device_count()):
            raise InputError(f"{self.local_size} processes on a machine with {there} GPUs; start as many as there are")
        return f"cuda:{self.local_rank}"


_alone = Processes()
_joined: list[Processes] = []


def processes() -> Processes:
    """Those that this one is joined with, inside `joined`; else this one alone."""
    return _joined[-1] if _joined else _alone


@contextmanager
def joined() -> Iterator[Processes]:
    """Inside, the processes that torchrun started are one; only the first prints. Without a launch, this one alone.

    Products and gradients travel by NCCL between GPUs and by gloo between CPUs. A process that the others wait for in
    a step for over SECONDS counts as lost: `errors.Lost`.
    """
    if _joined or not launched():
        yield processes()
        return
    numbers = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    found = Processes(*numbers)
    if found.size == 1:
        yield found
        return
    _begin(found)
    quiet, level, log = console.quiet, logging.getLogger("encdiff").level, logging.getLogger("encdiff")
    if not found.first:
        console.quiet = True
        log.setLevel(logging.ERROR)
    _joined.append(found)
    try:
        yield found
        _part()
    except (Stopped, Told):  # all come here; after another error some do not
        _part()
        raise
    finally:
        _joined.remove(found)
        console.quiet = quiet
        log.setLevel(level)


def patience() -> float:
    """Seconds until a process that the others wait for in a step counts as lost; InputError for no number above 0."""
    text = os.environ.get("ENCDIFF_TIMEOUT", str(SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise InputError(f"ENCDIFF_TIMEOUT is {text!r}, must be a number of seconds above 0")
    return seconds


def _part() -> None:
    gc.collect()  # NCCL waits for captured graphs that hold its work, in what is only garbage, too
    dist.destroy_process_group()


def _begin(found: Processes) -> None:
    try:
        seconds = patience()
    except InputError as error:  # every process meets it, and none can ask the others who says it
        raise (error if found.first else Told(str(error))) from None
    end_with_launcher()
    if torch.cuda.is_available():
        torch.cuda.set_device(found.local_rank % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _watched():
        found._store = meet(found.rank, found.size, seconds)
        dist.init_process_group(
            backend, store=found._store, rank=found.rank, world_size=found.size, timeout=timedelta(seconds=seconds)
        )
        found._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    """What the work gives, or what a user is told of why it gave nothing."""
    try:
        return work(), None
    except Told:  # in all of them
        raise
    except (InputError, OSError) as error:
        return None, str(error)


def _retold(error: str, rank: int) -> Told:
    return Told(error if rank == 0 else f"process {rank}: {error}")


@contextmanager
def _watched() -> Iterator[None]:
    """What a collective raises where another process is gone."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise Lost(
            "another process ended or did not answer in time; a training goes on from its last checkpoint with "
            "resume=True (--resume)"
        ) from error
