"""What the fused norms share: where the gradients of their parameters go."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from encdiff.ops._beside import Sink, put_together, sinks_of


def beside_or_with_input(
    x: Tensor, parameters: Sequence[Tensor | None], with_input: bool, form: type[torch.autograd.Function], op: Callable
) -> Callable[..., Any]:
    """The op, or its `form` where the parameters' gradients have sinks, or where x goes on and is asked for, too."""
    from encdiff.kernels._rows import sum_rows

    sinks = sinks_of(x, *(p for p in parameters if p is not None))
    if sinks is None and not with_input:
        return op
    return partial(form.apply, sum_rows if sinks is None else partial(_into, sinks))


def _into(sinks: Sequence[Sink], rows: Tensor, parameters: list[Tensor]) -> list[None]:
    """The sums of rows (B, vectors, C) over B go there, beside the backward pass."""
    from encdiff.kernels._rows import sum_rows_into

    with sinks[0].beside.aside(rows):
        put_together(sinks, partial(sum_rows_into, rows))
    return [None] * len(parameters)
