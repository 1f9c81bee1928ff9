"""What a compiler is told of a function, without loading the compiler: that takes a second or two of every start."""

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def asked_once(function: F) -> F:
    """As `torch.compiler.assume_constant_result`: it runs while a graph is traced, and the graph holds its answer."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]  # all that PyTorch's own does
    return function
