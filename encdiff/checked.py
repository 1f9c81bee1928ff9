"""Checked configurations: the type hints of a dataclass, and what they are annotated with, are enforced."""

import dataclasses
import math
import types
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from encdiff.errors import InputError

C = TypeVar("C")


class Range(NamedTuple):
    """Bounds of a number, annotated to its type; `above` excludes the lower one."""

    low: float
    high: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        if self.high <= 1:
            return f"in {self.low:g}..{self.high:g}"
        least = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        return least if self.high == math.inf else f"{least} and at most {self.high:.12g}"

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and value <= self.high < math.inf


# Every number has an upper bound, so that none overflows, and what a file declares cannot be built for ever.
Count = Annotated[int, Range(1, 2**31 - 1)]
Natural = Annotated[int, Range(0, 2**31 - 1)]
Batch = Annotated[int, Range(1, 2**16)]
Seed = Annotated[int, Range(0, 2**63 - 1)]
Width = Annotated[int, Range(1, 2**14)]  # of a layer, or a picture's side
Depth = Annotated[int, Range(1, 64)]  # how often a layer is repeated
Codes = Annotated[int, Range(1, 2**24)]  # of a codebook
Multiple = Annotated[int, Range(1, 256)]  # of a width
Positive = Annotated[float, Range(0, 1e30, above=True)]
NotNegative = Annotated[float, Range(0, 1e30)]
Fraction = Annotated[float, Range(0, 1)]
LEVELS = 16  # at most so many entries in a list


def check_types(**given: tuple[Any, type, str]) -> None:
    """Raise InputError for the first argument, by name (value, class, who makes one), that is not of its class."""
    for name, (value, kind, maker) in given.items():
        if not isinstance(value, kind):
            made = f": {maker} makes one" if maker else ""
            article = "an" if kind.__name__[0] in "AEIOU" else "a"
            raise InputError(f"{name} is a {type(value).__name__}, must be {article} {kind.__name__}{made}")


class Checked:
    """Base of a frozen dataclass whose fields are checked, and lists made tuples, when it is built."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, name, value)
            if not _fits(value, hint):
                raise InputError(f"{name} is {_short(repr(value))}, must be {_describe(hint)}")

    @classmethod
    def from_dict(cls: type[C], values: Any, source: str = "configuration") -> C:
        """Build from what a JSON file holds; errors name `source`."""
        if not isinstance(values, dict):
            raise InputError(f"{source}: holds {type(values).__name__}, must be an object of named entries")
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cast(Any, cls))})
        if unknown:
            raise InputError(
                f"{source}: unknown entries {_short(', '.join(unknown))}; is it of another program or version?"
            )
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0]) and all(r.holds(value) for r in args[1:])
    if origin is Literal:
        return value in args and isinstance(value, str)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is tuple:
        items = [args[0]] * len(value) if args[-1] is Ellipsis and isinstance(value, tuple) else args
        return isinstance(value, tuple) and len(value) == len(items) <= LEVELS and all(map(_fits, value, items))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{_describe(args[0])} {' and '.join(map(str, args[1:]))}"
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is tuple:
        return "a list, each " + _describe(args[0]) + (f", {LEVELS} at most" if args[-1] is Ellipsis else "")
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return names.get(hint, hint.__name__)


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
