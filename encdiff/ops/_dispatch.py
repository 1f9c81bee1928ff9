"""Choose an implementation of an op, and say why.

The choice is a pure function of the inputs: every implementation answers with the reasons why it cannot serve them, and
`auto` takes the first that has none. Nothing is decided at import time and no exception is swallowed.
"""

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from encdiff.errors import InputError
from encdiff.ops._compiling import asked_once

log = logging.getLogger("encdiff.ops")

OPS: dict[str, "Op"] = {}
_logged: set[tuple[str, str, str]] = set()


class _Here(threading.local):
    """What holds in this thread alone. Not a ContextVar: `torch.compile` cannot read one, and guards on this."""

    def __init__(self):
        self.forced: str | None = None  # set by use_impl; wins over ENCDIFF_IMPL
        self.ran: list[tuple[str, str]] | None = None  # filled inside record_impls


_here = _Here()


def always(*args, **kwargs) -> list[str]:
    """The reasons of an implementation that serves every input: none."""
    return []


class Implementation(NamedTuple):
    """`reasons(*args, **kwargs)` lists why `fn(*args, **kwargs)` cannot serve; an empty list means that it can.

    `doubts` lists why another should, though it can: it is then taken only by force. `composite`: made of PyTorch's own
    operators, so that forward mode and torch.func go through it, too.
    """

    name: str
    fn: Callable[..., Any]
    reasons: Callable[..., list[str]]
    doubts: Callable[..., list[str]] = always
    composite: bool = False

    def against(self, *args, **kwargs) -> list[str]:
        if not self.composite and is_transformed(*args, *kwargs.values()):
            return ["forward mode and torch.func do not go through it, but through 'reference'"]
        return self.reasons(*args, **kwargs)


def is_transformed(*inputs) -> bool:
    """Whether torch.func (grad, jvp, vmap, ...) is at work, or forward mode on one of these inputs, tensors among them.

    Our kernels have backward mode alone.
    """
    if _is_in_torch_func():
        return True
    if forward_ad._current_level < 0:  # of the whole process: another thread's level does not make these dual
        return False
    return torch.compiler.is_compiling() or any(_is_dual(t) for t in inputs)


def _is_dual(x) -> bool:
    if isinstance(x, list | tuple):
        return any(_is_dual(t) for t in x)
    return isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None


@asked_once  # while a graph is traced; compiled code is guarded by the answer
def _is_in_torch_func() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def forced_here() -> str | None:
    """The implementation that `use_impl` or ENCDIFF_IMPL names for every op that has it."""
    name = _here.forced or os.environ.get("ENCDIFF_IMPL") or "auto"
    if name == "auto":
        return None
    _check_known(name)
    return name


class Op:
    """An op and its implementations, in order of preference; calling it runs the one that `choose` picks."""

    def __init__(self, name: str, implementations: list[Implementation]):
        self.name = name
        self.implementations = implementations
        OPS[name] = self

    def __call__(self, *args, impl: str | None = None, **kwargs):
        chosen = self.choose(*args, impl=impl, **kwargs)
        if _here.ran is not None:
            _here.ran.append((self.name, chosen.name))
        return chosen.fn(*args, **kwargs)

    def choose(self, *args, impl: str | None = None, **kwargs) -> Implementation:
        forced = impl or self._default()
        if forced is not None:
            return self._get_forced(forced, *args, **kwargs)
        for implementation in self.implementations:
            reasons = implementation.against(*args, **kwargs) or implementation.doubts(*args, **kwargs)
            if not reasons:
                return implementation
            _log_once(self.name, implementation.name, reasons)
        raise InputError(f"{self.name}: no implementation serves this input\n{self.explain(*args, **kwargs)}")

    def fuses(self, *args, **kwargs) -> bool:
        """Whether a call is for the first implementation, a kernel; False, and no error, where it cannot serve."""
        first, forced = self.implementations[0], self._default()
        if forced not in (None, first.name) or first.against(*args, **kwargs):
            return False
        return forced == first.name or not first.doubts(*args, **kwargs)

    def explain(self, *args, impl: str | None = None, **kwargs) -> str:
        """One line per implementation: what speaks against it, and which one is taken, by force or by `auto`."""
        lines, taken, forced = [], False, self._named(impl) or self._default()
        for implementation in self.implementations:
            name = implementation.name
            against = implementation.against(*args, **kwargs)
            against = against or ([] if name == forced else implementation.doubts(*args, **kwargs))
            chosen = not against and (not taken if forced is None else name == forced)
            verdict = "; ".join(against) or ("can serve" if not chosen else "chosen" if forced is None else "forced")
            taken = taken or chosen
            lines.append(f"{self.name}: {name}: {verdict}")
        return "\n".join(lines)

    def overview(self, impl: str | None = None) -> str:
        """One line per implementation, the preferred one first: what it is, and whether it is forced."""
        forced = self._named(impl) or self._default()
        lines = []
        for name, fn, *_ in self.implementations:
            what = (fn.__doc__ or "").strip().partition("\n")[0]
            lines.append(f"{self.name}: {name}{' (forced)' * (name == forced)}: {what}")
        return "\n".join(lines)

    def _named(self, impl: str | None) -> str | None:
        if impl is not None and all(i.name != impl for i in self.implementations):
            raise InputError(f"{self.name}: impl={impl!r} must be one of {[i.name for i in self.implementations]}")
        return impl

    def _default(self) -> str | None:
        name = forced_here()
        return name if any(i.name == name for i in self.implementations) else None

    def _get_forced(self, name: str, *args, **kwargs) -> Implementation:
        if isinstance(name, _Asked):
            raise _Answer(self.explain(*args, impl=name.impl, **kwargs))
        for implementation in self.implementations:
            if implementation.name == name:
                reasons = implementation.against(*args, **kwargs)
                if reasons:
                    raise InputError(f"{self.name}: impl={name!r} cannot serve this input: {'; '.join(reasons)}")
                return implementation
        raise InputError(f"{self.name}: impl={name!r} must be one of {[i.name for i in self.implementations]}")


class _Asked(str):
    """Passed for `impl`: do not run, say what would."""

    impl: str | None


class _Answer(Exception):
    """What would run, from the place where an op chooses."""


def _check_known(name: str) -> None:
    known = {i.name for op in OPS.values() for i in op.implementations}
    if name not in known:
        raise InputError(f"implementation {name!r} must be 'auto' or one of {sorted(known)}")


def _log_once(op: str, implementation: str, reasons: list[str]) -> None:
    if torch.compiler.is_compiling():  # a log call would break the graph
        return
    for reason in reasons:
        if (op, implementation, reason) not in _logged:
            _logged.add((op, implementation, reason))
            log.info("%s: not %s: %s", op, implementation, reason)


@contextmanager
def use_impl(name: str) -> Iterator[None]:
    """Force the implementation `name` for every op that has one of that name, in this thread; others choose as usual.

    `"auto"` restores the automatic choice, also over the environment variable `ENCDIFF_IMPL`.
    """
    if name != "auto":
        _check_known(name)
    before, _here.forced = _here.forced, name
    try:
        yield
    finally:
        _here.forced = before


@contextmanager
def record_impls() -> Iterator[list[tuple[str, str]]]:
    """Collect (op, implementation) of every call of this thread inside the block: the proof of what ran."""
    before, _here.ran = _here.ran, []
    try:
        yield _here.ran
    finally:
        _here.ran = before


def carried(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` under what is forced and recorded now, in whatever thread: autograd has one of its own for a GPU."""
    forced, ran = _here.forced, _here.ran

    def carrying(*args, **kwargs):
        before = _here.forced, _here.ran
        _here.forced, _here.ran = forced, ran
        try:
            return run(*args, **kwargs)
        finally:
            _here.forced, _here.ran = before

    return carrying


def explain(op: str | Callable[..., Any], *args, impl: str | None = None, **kwargs) -> str:
    """Say which implementation an op would take for these arguments, and what speaks against the others.

    `op` is the op's name or its public function, whose own arguments follow: `print(explain("cross_attention", x,
    context, ...))`, `impl` included. Without arguments: the implementations in order of preference.
    Raises InputError for an unknown op, and for arguments that it refuses.
    """
    name = op if isinstance(op, str) else op.__name__
    given, ours = bool(args or kwargs), not isinstance(op, str) and op.__module__.startswith("encdiff.ops.")
    if name not in OPS and not (ours and given):  # such as timesteps, which chooses as uniform
        raise InputError(f"op {name!r} must be one of {sorted(OPS)}")
    if not given:
        return OPS[name].overview(impl)
    asked = _Asked("explain")
    asked.impl = impl
    try:
        _public(op)(*args, impl=asked, **kwargs)
    except _Answer as answer:
        return str(answer)
    raise InputError(f"op {name!r} leaves these arguments to PyTorch; the choice is that of {sorted(OPS)}")


def _public(op: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function of an op's name, which lies beside its reference."""
    if not isinstance(op, str):
        return op
    return getattr(sys.modules[OPS[op].implementations[-1].fn.__module__], op, OPS[op])
