"""The step that every training of one network shares: loss, gradients, clipping, AdamW, an average, one engine."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from encdiff.data.loader import Batches
from encdiff.distributed.processes import Processes, processes
from encdiff.distributed.shards import like, local, norm, part_of, shard, whole
from encdiff.distributed.share import Share
from encdiff.engine import Graph, choose, float32_precision
from encdiff.engine.graph import unowned
from encdiff.errors import InputError
from encdiff.files.checkpoint import load_state
from encdiff.models.layers import channels_last, share_statistics
from encdiff.models.unet import UNet
from encdiff.profiling import phase
from encdiff.training.loop import share_start
from encdiff.training.masters import Masters
from encdiff.training.recipes import DescentConfig
from encdiff.training.runs import load_optimizer, optimizer_tensors


class Descent(ABC):
    """Everything that changes from step to step: model, average, optimiser, step count. A subclass gives `_loss`.

    Args:
        averaged: the name of the part of the model whose average is kept.
        fixed: parts that learn nothing and compute in float32 beside masters, too.
        masters: for precision "bf16": float32 masters beside a bfloat16 copy that computes (`training.masters`), in
            place of autocast; None: on a GPU. Checkpoints are the same. The model's parameters then must stay where
            they are.
        aside: with masters, in a captured step: gradients of weights are computed on a stream beside the backward pass
            (`encdiff.ops._beside`), to the same bits, which takes a sixth off the paper's step on an H200 and keeps at
            most half a gigabyte longer. Not with `checkpoint_activations`, which is to save memory.
    """

    TERMS: tuple[str, ...] = ("loss", "gradient_norm", "learning_rate")
    UNIT: ClassVar[str] = "images"

    def __init__(
        self,
        model: nn.Module,
        averaged: str,
        config: DescentConfig,
        fixed: Sequence[nn.Module] = (),
        masters: bool | None = None,
        aside: bool = True,
    ):
        if masters and config.precision != "bf16":
            raise InputError(f"masters is True, needs precision 'bf16', but it is {config.precision!r}")
        self.sharded = config.shard and processes().size > 1
        self.model: Any = model.train() if self.sharded else channels_last(model.train())
        self.part, self.config, self.step = averaged, config, 0
        self.processes, self.asked = processes(), False
        self.device = next(model.parameters()).device
        share_start(self.model_config() if self.processes.size > 1 else {}, config, [model], self.processes)
        share_statistics(model)
        self.ema: nn.Module = copy.deepcopy(self.averaged).requires_grad_(False)
        if self.sharded:
            for part in (self.averaged, self.ema):
                _shard(part.to(memory_format=torch.contiguous_format), self.processes)  # type: ignore[call-overload]
        self._assembled: dict[str, Tensor] | None = None  # of a model in shards, while it is saved or shown
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.masters: Masters | None = None  # or `optimizer`, one of them
        self.optimizer: AdamW | None = None
        engine, on_gpu = choose(config.engine, self.device), self.device.type == "cuda"
        if self.sharded:
            engine = _engine_of_shards(config.engine)
        if not self.sharded and (masters or (masters is None and config.precision == "bf16" and on_gpu)):
            aside = aside and engine == "graph" and not config.checkpoint_activations  # which is to save memory
            self.masters = Masters(model, self.averaged, self.ema, config.betas, config.weight_decay, fixed, aside)
        else:
            self.optimizer = self._adamw()
        share = Share(self.processes.rank, self.processes.size, config.accumulate)
        rows = share.rows(config.batch_size)  # of each batch, this process's
        self.rows = None if share.size == 1 else torch.from_numpy(rows).to(self.device)
        self.share = share
        self.computing: Any = model if self.masters is None else self.masters.compute  # whose loss it is
        # one graph for each shape; on a GPU inside the CUDA graph, since compiled parts alone wait for the host
        compute: Callable[..., Tensor] = type(self)._loss
        self._compute = torch.compile(compute, dynamic=False) if engine == "compile" else compute
        work = unowned(self._work)
        self._run = Graph(work) if engine == "graph" or (engine == "compile" and on_gpu) else work

    @property
    def averaged(self) -> nn.Module:
        return getattr(self.model, self.part)

    @abstractmethod
    def _loss(self, **inputs: Tensor) -> Tensor:
        """Of what `advance` was given, on the device, by `computing`."""

    def _adamw(self) -> AdamW:
        # of what is in shards the own part: the arithmetic is of single numbers
        self.own = [nn.Parameter(local(p.detach())) if self.sharded else p for p in self.parameters]
        return AdamW(
            self.own,
            torch.tensor(self.config.learning_rate, device=self.device),  # a tensor: a captured graph reads it anew
            self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
            capturable=self.device.type == "cuda",
        )

    def begin(self, samples: Tensor) -> None:  # noqa: B027 - a hook: not every training needs it
        """Whatever needs the first batch, before step 0."""

    def prepare(self, batches: Batches) -> None:  # noqa: B027 - a hook
        """Whatever is computed once for the data, before any step."""

    def rate(self) -> float:
        """The learning rate of this step."""
        c = self.config
        rising = (self.step + 1) / max(1, c.warmup)
        falling = (c.steps - self.step) / (c.decay * c.steps) if c.decay else 1.0
        return c.learning_rate * min(1.0, rising, falling)

    def descend(self, **inputs: Tensor) -> dict[str, Tensor | float]:
        """One step on what `_loss` takes, beside the sample ids and the draw of this step; returns TERMS."""
        # the key of a sample is its place in the endless stream of shuffled ones, whatever the batches it is cut into
        draw, first = divmod(self.step * self.config.batch_size, 2**32)
        count = len(next(iter(inputs.values())))
        inputs["sample_ids"] = first + (torch.arange(count, device=self.device) if self.rows is None else self.rows)
        rate, n = self.rate(), self.step + 1
        follow = 1 - min(self.config.ema, (1 + n) / (10 + n))
        inputs["draw"] = torch.full((), draw, device=self.device)
        if self.masters is None:
            cast(AdamW, self.optimizer).param_groups[0]["lr"].fill_(rate)
            inputs["follow"] = torch.full((), follow, device=self.device)
        else:
            self.masters.check()
            self.masters.prepare(rate, follow)
        if self.processes.size > 1:
            inputs["asked"] = torch.full((), float(self.asked), device=self.device)
        with float32_precision(self.config.precision != "float32"):  # bf16: of the first stage
            loss, norm, *asked = self._run(**inputs)
        self.step += 1
        if self.masters is not None:
            self.masters.updates += 1
        terms: dict[str, Tensor | float] = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        return terms | ({"asked": asked[0]} if asked else {})

    def _work(self, follow: Tensor | None = None, asked: Tensor | None = None, **inputs: Tensor) -> tuple[Tensor, ...]:
        """The whole step on the device, nothing read back: loss, gradients, clipping, AdamW, EMA."""
        if self.masters is not None:
            self.masters.zero_grad()
        for p in self.parameters:
            p.grad = None
        loss = self._gradients(inputs)
        told: tuple[Tensor, ...] = (loss,)
        if asked is not None:
            with phase("exchange"):
                told = self._exchange(loss, asked)
        with phase("optimizer"):
            if self.masters is not None:
                norm = self.masters.step(self.config.gradient_clip)
            else:
                norm = self._clip()
                if self.sharded:
                    for own, p in zip(self.own, self.parameters, strict=True):
                        own.grad = None if p.grad is None else local(p.grad)
                cast(AdamW, self.optimizer).step()
        if self.masters is None:
            assert follow is not None, "without masters `advance` gives it"
            with phase("average"), torch.no_grad():
                averages, weights = ([local(p) for p in m.parameters()] for m in (self.ema, self.averaged))
                lerp(averages, weights, follow)
        return told[0], norm, *told[1:]

    def _gradients(self, inputs: dict[str, Tensor]) -> Tensor:
        """The loss of this process's rows, and in the parameters, or the masters, its gradient; part after part."""
        parts = self.config.accumulate
        losses = []
        for i in range(parts):
            own = inputs if parts == 1 else {k: v.chunk(parts)[i] if v.ndim else v for k, v in inputs.items()}
            with phase("forward"):
                loss = self._compute(self, **own)
            with phase("backward"):
                try:
                    (loss if parts == 1 else loss / parts).backward()
                finally:  # also after an error: a capture must not end before what it began
                    if self.masters is not None:
                        self.masters.beside.join()
            if self.masters is not None:
                self.masters.collect(i, parts)
            losses.append(loss.detach())
        return losses[0] if parts == 1 else torch.stack(losses).mean()

    def _exchange(self, loss: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
        """The gradients become the means of all processes'; returns those of the loss, and of who is asked to stop."""
        told = torch.stack([loss.float(), asked])
        self.processes.mean_(told)
        if self.masters is not None:
            for segment, _ in self.masters.segments:
                self.processes.mean_(segment.gradient)
        else:
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            self.processes.mean_all_([g for g in gradients if local(g) is g])  # those in shards are the means already
        return told.unbind()

    def _clip(self) -> Tensor:
        """The norm of all gradients, which then is at most `gradient_clip`."""
        if self.sharded:
            found = norm([p.grad for p in self.parameters if p.grad is not None], self.processes)
            if self.config.gradient_clip:
                scale = (self.config.gradient_clip / (found + 1e-6)).clamp(max=1.0)
                torch._foreach_mul_([local(p.grad) for p in self.parameters if p.grad is not None], scale)
            return found
        if self.config.gradient_clip:
            return nn.utils.clip_grad_norm_(self.parameters, self.config.gradient_clip)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def _autocast(self) -> torch.autocast:
        """Where bfloat16 computes without masters."""
        autocast = self.config.precision == "bf16" and self.masters is None
        return torch.autocast(self.device.type, torch.bfloat16, enabled=autocast)

    def model_config(self) -> dict:
        return asdict(self.model.config)

    @contextmanager
    def assembled(self) -> Iterator[None]:
        """Inside, the first process has the whole of a model that is in shards, on the CPU; all must come to this."""
        if self.sharded:
            self._assembled = self._whole()
        try:
            yield
        finally:
            self._assembled = None

    def _whole(self) -> dict[str, Tensor]:
        """`tensors`, whole, in the first process; one after the other in the others."""
        moments = optimizer_tensors(cast(AdamW, self.optimizer))
        of = {str(i): p for i, p in enumerate(self.parameters)}
        shards = {k: v if v.ndim == 0 else like(v, of[k.split(".")[1]]) for k, v in moments.items()}
        found = {}
        for name, tensor in (self._states() | shards).items():
            full = whole(tensor)
            if self.processes.first:
                found[name] = full
        return found

    def _states(self) -> dict[str, Tensor]:
        model = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        return model | {f"ema.{k}": v for k, v in self.ema.state_dict().items()}

    def averaged_model(self) -> Any:
        """A copy to sample from, its averaged part that average, the rest as it stands; eval mode.

        Of a model in shards on the CPU, and only within `assembled`.
        """
        if self.sharded:
            assert self._assembled is not None, "within `assembled`"
            model, held = type(self.model)(self.model.config), self._assembled
            model.load_state_dict({k.removeprefix("model."): v for k, v in held.items() if k.startswith("model.")})
            average = {k.removeprefix("ema."): v for k, v in held.items() if k.startswith("ema.")}
        else:
            model, average = copy.deepcopy(self.model), self.ema.state_dict()
        getattr(model, self.part).load_state_dict(average)
        return model.eval()

    def save_model(self, folder: Path) -> None:
        self.averaged_model().save_pretrained(folder)

    def tensors(self) -> dict[str, Tensor]:
        if self._assembled is not None:
            return self._assembled
        moments = self.masters.tensors() if self.masters else optimizer_tensors(cast(AdamW, self.optimizer))
        return self._states() | moments

    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str], source: Path) -> None:
        """Continue from `tensors`; InputError, naming `source`, if they are of another configuration."""
        if self.sharded:
            tensors = self._own(tensors)
        for prefix, module in (("model.", self.model), ("ema.", self.ema)):
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            load_state(module, own, source)
        if self.masters is None:
            load_optimizer(cast(AdamW, self.optimizer), tensors, source)
        else:
            self.masters.load(tensors, source)

    def _own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of whole tensors this process's parts."""
        of: dict[str, Tensor] = {f"optimizer.{i}": p for i, p in enumerate(self.parameters)}
        of |= self._states()

        def own(name: str, full: Tensor) -> Tensor:
            parameter = of.get(name, of.get(name.rpartition(".")[0], full))
            part = part_of(full, parameter, self.processes)
            return part if name.startswith("optimizer.") else like(part, parameter)

        return {name: own(name, full) for name, full in tensors.items()}


def _shard(part: nn.Module, among: Processes) -> None:
    """The stages of a part's U-Net in shards."""
    unet = next(module for module in part.modules() if isinstance(module, UNet))
    shard(unet, unet.stages, unet.read_ahead(), among)


def _engine_of_shards(engine: str) -> str:
    if engine not in ("auto", "eager"):
        raise InputError(f"engine is {engine!r}, must be 'eager' or 'auto' with shard: parts come and go between calls")
    return "eager"


def lerp(into: list[Tensor], of: list[Tensor], weight: Tensor) -> None:
    """into += weight (of - into) for each pair, weight a number on their device, float32."""
    if into[0].is_cuda:  # there `_foreach_lerp_` takes such a weight one tensor at a time
        difference = torch._foreach_sub(of, into)
        torch._foreach_mul_(difference, weight)
        torch._foreach_add_(into, difference)
    else:
        torch._foreach_lerp_(into, of, [weight] * len(into))
