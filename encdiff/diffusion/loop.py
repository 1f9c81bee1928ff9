"""The loop behind every sampler: a list of stages, each one pass of `ops.step`; a new sampler is a list."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypedDict, Unpack

import torch

from encdiff.errors import InputError
from encdiff.ops.noise import compute_dtype, step

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor | tuple[torch.Tensor, torch.Tensor]]
Callback = Callable[[int, float, torch.Tensor, torch.Tensor], None]


class Stage(NamedTuple):
    """One pass of `ops.step`. `time` None does not call the model: its output is the last x0."""

    time: float | None
    row: tuple[float, ...]  # c0 .. c4, then those of `history`
    history: tuple[str, ...] = ()
    # "x": what the stage before began with; "x0", "older x0": of the last two calls; "output": the model's, unguided


class Options(TypedDict, total=False):
    """What every sampler takes.

    - `clip` bounds every x0 to [-clip, clip]; with `quantile` it is Imagen's dynamic threshold (`ops.step`);
    - `guidance` w: `denoise` returns a pair, and the output is its second + w (its first - its second), that is
      unconditional + w (conditional - unconditional); the two may come from one batch, by `chunk(2)`;
    - `seed` and `sample_ids` (B,) key the noise of a stochastic sampler: stage i = 0, 1, .. adds `ops.normal(x.shape,
      seed, sample_ids, i + 1)`, so a sample is the same in any batch, and draw 0 is free for the start. Without a seed
      torch's global generator gives one, without ids they are 0 .. B-1;
    - `generator` draws that noise from torch's own stream instead, on its own device, to compare with other code: a
      sample then depends on its batch, unless each has one of its own;
    - `callback(i, t, x, x0)` is called at the model's call i = 0, 1, .. with the x it saw and the x0 predicted from it.

    The loop writes over its own x, so `denoise` must not keep it; with a callback, every x and x0 is a fresh tensor.
    """

    clip: float | None
    quantile: float | None
    guidance: float | None
    seed: int | None
    sample_ids: torch.Tensor | None
    generator: torch.Generator | Sequence[torch.Generator] | None
    callback: Callback | None


@torch.no_grad()
def run(denoise: Denoise, x: torch.Tensor, stages: list[Stage], **options: Unpack[Options]) -> torch.Tensor:
    """Take x (B, ...) through the stages, without gradients; `Options` says what the options mean."""
    walk = Walk(x, stages, **options)
    while (time := walk.time) is not None:
        walk.advance(denoise(walk.x, time))
    return walk.x


class Walk:
    """x on its way through the stages, from one call of the model to the next: what `run` does.

        walk = Walk(x, stages, **options)
        while (time := walk.time) is not None:
            walk.advance(denoise(walk.x, time))
        x0 = walk.x

    With `fresh`, or a callback, every x and x0 is a tensor of its own, and `x` may be replaced between two calls; else
    the walk writes over its own. To be run under `torch.no_grad()`.
    """

    def __init__(
        self,
        x: torch.Tensor,
        stages: list[Stage],
        *,
        fresh: bool = False,
        clip: float | None = None,
        quantile: float | None = None,
        guidance: float | None = None,
        seed: int | None = None,
        sample_ids: torch.Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        callback: Callback | None = None,
    ):
        self.rows, self.times = _tables(stages, x)
        if generator is not None and seed is not None:
            raise InputError("generator and seed are both given, must be one of them: either draws the noise")
        if generator is None and seed is None and any(stage.row[4] for stage in stages):
            seed = int(torch.randint(2**63 - 1, ()))
        self.x, self.stages, self.done, self.calls = x, stages, 0, 0
        self.clip, self.quantile, self.guidance = clip, quantile, guidance
        self.seed, self.sample_ids, self.generator = seed, sample_ids, generator
        self.callback, self.fresh = callback, fresh or callback is not None
        self.keeps_x0 = callback is not None or any(stage.history or stage.time is None for stage in stages)
        self.past: dict[str, torch.Tensor] = {}
        self._pass_uncalled()

    @property
    def time(self) -> torch.Tensor | None:
        """When to call the model for the next stage, (B,) on x's device; None at the end."""
        return self.times[self.done].expand(len(self.x)) if self.done < len(self.stages) else None

    def advance(self, output: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> None:
        """Take x through the stage that this output of the model is for, and on to the next call."""
        self._pass(*_pair(output, self.guidance))
        self._pass_uncalled()

    def _pass_uncalled(self) -> None:
        while self.done < len(self.stages) and self.stages[self.done].time is None:
            self._pass(self.past.get("x0", self.x))

    def _pass(self, output: torch.Tensor, unconditional: torch.Tensor | None = None) -> None:
        (time, _, names), x, past = self.stages[self.done], self.x, self.past
        called = time is not None
        reuse = not self.fresh and self.done > 1  # no later stage reads these two; the very first x is the caller's
        x_next, x0 = past["x"] if reuse else torch.empty_like(x), None
        if called and self.keeps_x0:
            x0 = past["older x0"] if reuse and "older x0" in past else torch.empty_like(x)
        history = tuple(output if name == "output" else past[name] for name in names)
        step(
            x, output, self.rows[self.done], clip=self.clip if called else None,
            quantile=self.quantile if called else None, unconditional=unconditional,
            guidance=1.0 if self.guidance is None else self.guidance, history=history,
            return_x0=x0 is not None, out=x_next if x0 is None else (x_next, x0), **self._noise(),
        )  # fmt: skip
        if self.callback is not None and time is not None and x0 is not None:
            self.callback(self.calls, time, x, x0)
        if x0 is not None:
            past |= {"older x0": past["x0"]} if "x0" in past else {}
            past["x0"] = x0
        past["x"], self.x = x, x_next
        self.calls, self.done = self.calls + called, self.done + 1

    def _noise(self) -> dict[str, Any]:
        if not self.stages[self.done].row[4]:
            return {}
        if self.generator is not None:
            return {"noise": _randn_like(self.x, self.generator)}
        return {"seed": self.seed, "sample_ids": self.sample_ids, "draw": self.done + 1}


def _randn_like(x: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator]) -> torch.Tensor:
    if not isinstance(generator, torch.Generator):  # one for each sample
        return torch.cat([_randn_like(row, own) for row, own in zip(x.split(1), generator, strict=True)])
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=compute_dtype(x)).to(x.device)


def _pair(output, guidance: float | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The model's output and the unconditional one, or None."""
    if guidance is None and isinstance(output, torch.Tensor):
        return output, None
    if guidance is None or isinstance(output, torch.Tensor) or len(output) != 2:
        made = "a tensor" if isinstance(output, torch.Tensor) else f"{len(output)} tensors"
        raise InputError(
            f"denoise returned {made}, must return a tensor, or with guidance the pair (output, unconditional)"
        )
    return output


def times(stages: list[Stage], device: torch.device) -> torch.Tensor:
    """When the stages call the model, (calls,): int64 where all are whole numbers, else float32."""
    return _times(tuple(stage.time for stage in stages if stage.time is not None), device)


def _tables(stages: list[Stage], x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The rows, each (1, columns), and the model's times, (stages,), on x's device before the loop begins."""
    numbers = tuple(c for stage in stages for c in stage.row)
    if not torch.tensor(numbers, dtype=compute_dtype(x)).isfinite().all():
        raise InputError("the schedule comes too near 0 to turn this prediction into x0; predict v or x0 instead")
    flat = _constant(numbers, compute_dtype(x), x.device)
    rows = [row[None] for row in flat.split([len(stage.row) for stage in stages])]
    return rows, _times(tuple(0 if stage.time is None else stage.time for stage in stages), x.device)


def _times(numbers: tuple[float, ...], device: torch.device) -> torch.Tensor:
    whole = all(float(time).is_integer() for time in numbers)
    return _constant(numbers, torch.int64 if whole else torch.float32, device)


@cache
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """These numbers on a device, copied there once: while a CUDA graph is captured, the host cannot copy.

    Never forgotten, a few kB for each schedule: a captured graph goes on reading them.
    """
    return torch.tensor(numbers, dtype=dtype, device=device)
