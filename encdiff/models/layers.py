"""PyTorch's linear layer and convolution by way of `ops`, which has faster gradients of their biases on a GPU."""

from collections.abc import Callable
from typing import TypeGuard, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from encdiff import ops
from encdiff.distributed.batch_norm import batch_norm
from encdiff.distributed.processes import processes

Pair = tuple[int, int]
M = TypeVar("M", bound=nn.Module)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        """`with_bias` False: without the bias, which what follows adds."""
        bias = self.bias if with_bias else None
        if self.groups != 1 or self.dilation != (1, 1) or self.padding_mode != "zeros":
            return self._conv_forward(x, self.weight, bias)
        stride, padding = cast(Pair, self.stride), cast(Pair, self.padding)  # two numbers, as nn.Conv2d keeps them
        return ops.conv2d(x, self.weight, bias, stride, padding)


class _SharedStatistics(nn.modules.batchnorm._BatchNorm):
    """While training and `shared`, the statistics are those of the rows of all processes, which hold equally many."""

    shared = False

    def forward(self, x: Tensor) -> Tensor:
        return _uncompiled(self, x) if self.shared and self.training else super().forward(x)

    def together(self, x: Tensor) -> Tensor:
        y, mean, variance = batch_norm(x, self.weight, self.bias, self.eps)
        count = processes().size * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]  # statistics are kept in all of ours
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)  # type: ignore[union-attr, arg-type]
        return y


_uncompiled: Callable[[_SharedStatistics, Tensor], Tensor]  # `together`: what others tell is in no compiled graph


class BatchNorm2d(_SharedStatistics, nn.BatchNorm2d):
    pass


class BatchNorm1d(_SharedStatistics, nn.BatchNorm1d):
    pass


def share_statistics(module: M) -> M:
    """The module, whose batch norms, while they train, take the rows of all processes for one batch."""
    global _uncompiled
    if several := processes().size > 1:
        _uncompiled = torch.compiler.disable(_SharedStatistics.together)  # here: it loads the compiler
    for norm in module.modules():
        if isinstance(norm, _SharedStatistics):
            norm.shared = several
    return module


def channels_last(module: M) -> M:
    """The module with its convolutions in that layout: the faster one, on a CPU and a GPU."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which PyTorch's hints leave out


def is_stock(module: nn.Module, kind: type[M]) -> TypeGuard[M]:
    """Whether a module is of that very class and has no hook: only then may another place do what it does."""
    m: nn.Module = module
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return type(m) is kind and not hooks


def zero_init(module: M) -> M:
    """Start a residual branch at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def part(modules: nn.Sequential, place: int, kind: type[M]) -> M:
    """The module at a place; type checkers take it for one of that kind, though a user may have put another there."""
    return modules[place]  # type: ignore[return-value]
