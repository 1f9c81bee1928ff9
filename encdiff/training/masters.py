"""Training in bfloat16 without autocast: float32 masters in flat buffers, and a bfloat16 copy that computes the loss.

Autocast rounds every weight anew in every step and gives back float32 gradients: a thousand small launches. Here the
optimiser's own launch writes the rounded copy, and gradients stay in bfloat16 until it reads them. Those of linear
layers and convolutions the backward pass itself writes to where it reads them (`encdiff.ops._beside`).
"""

import copy
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops._beside import Beside, Sink, give
from encdiff.training.runs import optimizer_state

ALIGNMENT = 64  # elements between the beginnings of two weights: 128 bytes of bfloat16, as libraries like them


class Segment:
    """Weights that compute in one type: masters, moments, averages, gradients and copies, each a flat buffer.

    Takes parameters, of which `averages` belong to the first; both become views of the buffers, with the strides that
    they had. `weights` are the views that compute: of the bfloat16 copy, or the masters themselves.
    """

    def __init__(self, parameters: Sequence[Tensor], averages: Sequence[Tensor], dtype: torch.dtype):
        filled = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in parameters]
        starts = [0, *accumulate(filled)]

        def zeros(count: int) -> Tensor:
            return torch.zeros(count, device=parameters[0].device, dtype=torch.float32)

        # of each: shape, strides without gaps, place
        self.places = [
            (p.shape, torch.empty_like(p, device="meta").stride(), start)
            for p, start in zip(parameters, starts, strict=False)
        ]
        self.master, self.exp_avg, self.exp_avg_sq = (zeros(starts[-1]) for _ in range(3))
        self.gradient = torch.zeros_like(self.master, dtype=dtype)
        self.sum: Tensor | None = None  # of the gradients of a batch's parts
        self.copy = None if dtype == torch.float32 else torch.zeros_like(self.gradient)
        self.average = zeros(starts[len(averages)]) if averages else None
        self.weights = self.views(self.master if self.copy is None else self.copy)
        self.gradients = self.views(self.gradient)
        for flat, tensors in ((self.master, parameters), (self.average, averages)):
            for tensor, view in zip(tensors, self.views(flat), strict=False):
                tensor.data = view.copy_(tensor.data)

    def views(self, flat: Tensor | None) -> list[Tensor]:
        """Of each parameter its part of a buffer; of those that a shorter buffer has."""
        return [] if flat is None else [flat.as_strided(*place) for place in self.places if place[2] < len(flat)]

    def round(self) -> None:
        """The copy anew from the masters."""
        if self.copy is not None:
            self.copy.copy_(self.master)

    def add(self, part: int, parts: int) -> None:
        """The gradient becomes the sum of those of all parts of a batch so far, which is kept in float32."""
        if self.sum is None:
            self.sum = torch.zeros_like(self.master)
        self.sum.copy_(self.gradient) if part == 0 else self.sum.add_(self.gradient)
        if part == parts - 1:
            self.gradient.copy_(self.sum)

    def norm(self) -> Tensor:
        return torch.linalg.vector_norm(self.gradient, dtype=torch.float32)

    def step(self, schedule: Tensor, scale: Tensor | None, **constants: Any) -> None:
        ops.adamw(
            self.master, self.gradient, self.exp_avg, self.exp_avg_sq, schedule,
            average=self.average, weights=self.copy, scale=scale, **constants,
        )  # fmt: skip


class Masters:
    """The trainable weights of a model in float32, packed, and `compute`, the model to take the loss of.

    The model keeps its names and meaning: its parameters become views of the flat masters, and those of `ema`, the
    average of the part `averaged`, of the flat averages. `compute` is a copy of the model in bfloat16, for use without
    autocast. It shares what learns nothing or computes in float32: the parts `fixed`, BatchNorm's parameters and
    running statistics. A parameter without a gradient counts as one with a gradient of zero.

    Written by hand between two steps, a master reaches `compute` with the next step, or by `refresh`. The parameters
    must stay where they are: `check` says when they did not.
    """

    def __init__(
        self,
        model: nn.Module,
        averaged: nn.Module,
        ema: nn.Module,
        betas: tuple[float, float],
        weight_decay: float,
        fixed: Sequence[nn.Module] = (),
        aside: bool = False,
    ):
        self.model, self.updates = model, 0
        self.betas, self.weight_decay = betas, weight_decay
        self.compute, exact = _copy(model, fixed)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise InputError("the model has no parameter that learns: all are frozen")
        if others := {p.dtype for p in self.parameters} - {torch.float32}:
            raise InputError(f"a parameter of the model is {others.pop()}, must be float32 for bfloat16 with masters")
        self.schedule = torch.zeros(4, device=self.parameters[0].device, dtype=torch.float32)  # see ops.adamw
        averages = dict(zip(map(id, averaged.parameters()), ema.parameters(), strict=True))
        order = sorted(range(len(self.parameters)), key=lambda i: id(self.parameters[i]) not in averages)
        parts = [[i for i in order if (id(self.parameters[i]) in exact) == float32] for float32 in (False, True)]
        self.segments: list[tuple[Segment, list[int]]] = []  # and which of the parameters it holds
        for indices, dtype in zip(parts, (torch.bfloat16, torch.float32), strict=True):
            members = [self.parameters[i] for i in indices]
            if members:
                means = [averages[id(p)] for p in members if id(p) in averages]
                self.segments.append((Segment(members, means, dtype), indices))
        self.beside = Beside(self.parameters[0].device if aside else None)
        self.computing = self._place()
        self.refresh()
        # what holds the parts of the model, and the parts
        self.tables: list[dict[str, Any]] = [
            t for m in model.modules() for t in (m._modules, m._parameters, m._buffers) if t
        ]
        self.parts = list(chain.from_iterable(map(dict.values, self.tables)))
        self.packed = [*self.parameters, *ema.parameters()]
        self.addresses = [p.data_ptr() for p in self.packed]

    def _place(self) -> list[nn.Parameter]:
        """Give the copy its weights; returns those that learn, in the model's order."""
        packed = {i: w for segment, indices in self.segments for i, w in zip(indices, segment.weights, strict=True)}
        views = {id(p): packed[i] for i, p in enumerate(self.parameters)}
        computing: dict[int, nn.Parameter] = {}
        for of, to in zip(self.model.modules(), self.compute.modules(), strict=True):
            for name, p in of._parameters.items():
                if p is not None and to._parameters[name] is not p:
                    rounded = views[id(p)] if id(p) in views else p.detach().to(torch.bfloat16)
                    to._parameters[name] = nn.Parameter(rounded, p.requires_grad)
                if p is not None:
                    computing[id(p)] = to.get_parameter(name)
        learning = [computing[id(p)] for p in self.parameters]
        for segment, indices in self.segments:
            for i, gradient in zip(indices, segment.gradients, strict=True):
                if learning[i] is not self.parameters[i]:
                    give(learning[i], Sink(self.beside, gradient))
        return learning

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters anew, after they were written from outside."""
        for segment, _ in self.segments:
            segment.round()
        pairs = zip(self.model.parameters(), self.compute.parameters(), strict=True)
        for p, rounded in pairs:
            if not p.requires_grad and p is not rounded:
                rounded.copy_(p)

    def check(self) -> None:
        """Raise RuntimeError where a part of the model is no longer what was packed, or learns no more.

        Of the average, where it was moved.
        """
        now = chain.from_iterable(map(dict.values, self.tables))  # every step: by identity alone, so in microseconds
        same = list(map(id, now)) == list(map(id, self.parts))
        if not same or [p.data_ptr() for p in self.packed] != self.addresses:
            raise RuntimeError(
                "a part of the model was moved or replaced after Training(model, ...) packed its parameters: "
                "change the model before, or write values into the parameters in place"
            )
        if not all(p.requires_grad for p in self.parameters):  # its copy would go on learning
            raise RuntimeError("a parameter was frozen after Training(model, ...) packed it: freeze it before")

    def prepare(self, rate: float, follow: float) -> None:
        """The learning rate and 1 - decay of the average of the next `step`; waits for nothing."""
        t, (beta1, beta2) = self.updates + 1, self.betas
        for into, value in zip(self.schedule, (rate, follow, 1 - beta1**t, 1 - beta2**t), strict=True):
            into.fill_(value)

    def zero_grad(self) -> None:
        self.beside.begin()
        for p in self.computing:
            p.grad = None

    @torch.no_grad()
    def collect(self, part: int = 0, parts: int = 1) -> None:
        """Bring the gradients of a backward pass, part after part of a batch, to where `step` reads them."""
        self.beside.join()
        for segment, indices in self.segments:
            found = [(view, self.computing[i]) for i, view in zip(indices, segment.gradients, strict=True)]
            if given := [(view, p.grad) for view, p in found if p.grad is not None]:
                gather([v for v, _ in given], [g for _, g in given], self.beside.written)
            if missing := [v for v, p in found if p.grad is None and v.data_ptr() not in self.beside.written]:
                torch._foreach_zero_(missing)
        self.zero_grad()  # their memory is free for what comes next
        for segment, _ in self.segments if parts > 1 else ():
            segment.add(part, parts)

    @torch.no_grad()
    def step(self, clip: float = 0.0) -> Tensor:
        """Clip the norm of the gradients collected to `clip` (0: not), AdamW, average, round; returns the norm before,
        float32."""
        norms = [segment.norm() for segment, _ in self.segments]
        norm = norms[0] if len(norms) == 1 else torch.hypot(*norms)
        scale = (clip / (norm + 1e-6)).clamp(max=1.0) if clip else None  # as torch.nn.utils.clip_grad_norm_
        for segment, _ in self.segments:
            segment.step(self.schedule, scale, betas=self.betas, weight_decay=self.weight_decay)
        return norm

    def tensors(self, prefix: str = "optimizer") -> dict[str, Tensor]:
        """As `runs.optimizer_tensors` names them."""
        if not self.updates:
            return {}
        found = {f"{prefix}.{i}.step": torch.tensor(float(self.updates)) for i in range(len(self.parameters))}
        for segment, indices in self.segments:
            for key, flat in (("exp_avg", segment.exp_avg), ("exp_avg_sq", segment.exp_avg_sq)):
                found |= {f"{prefix}.{i}.{key}": v for i, v in zip(indices, segment.views(flat), strict=True)}
        return found

    def load(self, tensors: dict[str, Tensor], source: str | Path, prefix: str = "optimizer") -> None:
        """Put back what `tensors` or `runs.optimizer_tensors` took, and round the masters, which are loaded already.

        Raises InputError, naming `source`, for what `runs.optimizer_state` refuses, and for several steps.
        """
        state = optimizer_state(self.parameters, tensors, source, prefix)
        steps = {int(entry["step"]) for entry in state.values()}
        if len(steps) > 1:
            raise InputError(f"{source}: its parameters are at steps {min(steps)} to {max(steps)}, must be at one")
        for segment, indices in self.segments:
            for key, flat in (("exp_avg", segment.exp_avg), ("exp_avg_sq", segment.exp_avg_sq)):
                for i, view in zip(indices, segment.views(flat), strict=True):
                    view.copy_(state[i][key]) if i in state else view.zero_()
        self.updates = steps.pop()
        self.refresh()


def gather(into: list[Tensor], gradients: list[Tensor], written: set[int]) -> None:
    """Gradients that came through `.grad`; added where a part of the weight's went into its sink."""
    both = [view.data_ptr() in written for view in into]
    if any(both):
        rest = [gradient for gradient, twice in zip(gradients, both, strict=True) if twice]
        torch._foreach_add_([view for view, twice in zip(into, both, strict=True) if twice], rest)
        into = [view for view, twice in zip(into, both, strict=True) if not twice]
        gradients = [gradient for gradient, twice in zip(gradients, both, strict=True) if not twice]
    if into:
        torch._foreach_copy_(into, gradients)


def _copy(model: nn.Module, fixed: Sequence[nn.Module]) -> tuple[nn.Module, set[int]]:
    """A copy that shares these parts, all buffers and BatchNorm's parameters; the latter's ids."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    exact = [p for norm in norms for p in norm.parameters(recurse=False)]
    shared = [*fixed, *model.buffers(), *exact]
    return copy.deepcopy(model, {id(one): one for one in shared}), {id(p) for p in exact}
