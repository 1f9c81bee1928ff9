"""A norm that gives its input, too, for a residual to go on from."""

from collections.abc import Callable

import torch


def with_input(norm: Callable, setup: Callable, gradients: Callable) -> type[torch.autograd.Function]:
    """The norm's y, and x once more: what comes back through it is added to dx where that is written.

    Applied to `sums` and what the norm takes. `sums(rows, parameters)` gives the parameters' gradients, or None for
    each where it puts them elsewhere.
    """

    class AndInput(torch.autograd.Function):
        @staticmethod
        def forward(ctx, sums, *inputs):
            ctx.sums, outputs = sums, norm(*inputs)
            setup(ctx, inputs, outputs)
            y, *moments = outputs
            return y, inputs[0].view_as(inputs[0]), *moments

        @staticmethod
        def backward(ctx, dy, skip, *_):
            return None, *gradients(ctx, dy, skip=skip, sums=ctx.sums)

    return AndInput
