"""How training steps and sampling run: call by call, compiled, or as one CUDA graph."""

import copy
import gc
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal
from weakref import WeakMethod

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.models import EncDiff

ENGINES = ("auto", "eager", "compile", "graph")
Work = Callable[..., tuple[Tensor, ...]]


def choose(engine: str, device: torch.device) -> str:
    """The engine that `auto` means on a device; InputError for one that cannot run there.

    A GPU waits for the host in every small layer, so there `auto` is the graph; `compile` compiles inside it, which on
    an H100 made the step slower. On a CPU `auto` is eager: compiling the quickstart model takes minutes and saves a
    fifth of a step (docs/performance.md).
    """
    if engine not in ENGINES:
        raise InputError(f"engine is {engine!r}, must be one of {', '.join(ENGINES)}")
    if engine == "graph" and device.type != "cuda":
        raise InputError(f"engine is 'graph', which is a CUDA graph, but the model is on {device}")
    if engine == "auto":
        return "graph" if device.type == "cuda" else "eager"
    return engine


class Graph:
    """`work(**inputs) -> outputs`, replayed as one launch.

    Inputs are tensors of fixed shapes, outputs are overwritten by the next call. `work` must read nothing back to the
    host, and keep its state (weights, moments, averages) in tensors that it updates in place. The first `warm_up` calls
    run as they are, on a side stream: libraries choose their algorithms and allocate, and parts under `torch.compile`
    are compiled. Nothing is run twice.
    """

    def __init__(self, work: Work, warm_up: int = 3):
        self.work, self.warm_up, self.calls = work, warm_up, 0
        self.side: torch.cuda.Stream | None = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        if self.calls < self.warm_up:
            outputs = self._aside(inputs)
            self.calls += 1  # a call that failed warmed up nothing
            return outputs
        if self.graph is None:
            self._capture(inputs)
        for name, tensor in inputs.items():
            self.inputs[name].copy_(tensor, non_blocking=True)
        self.graph.replay()
        return self.outputs

    def _aside(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        device = next(iter(inputs.values())).device
        self.side = self.side or torch.cuda.Stream(device)
        main, side = torch.cuda.current_stream(device), self.side
        side.wait_stream(main)
        with torch.cuda.stream(side), _uncached():
            outputs = self.work(**inputs)
        main.wait_stream(side)
        for tensor in (*inputs.values(), *outputs):  # not to be handed out again before the other stream is done
            tensor.record_stream(side)
            tensor.record_stream(main)
        return outputs

    def _capture(self, inputs: dict[str, Tensor]) -> None:
        device = next(iter(inputs.values())).device
        graph, held = torch.cuda.CUDAGraph(), {name: tensor.clone() for name, tensor in inputs.items()}
        # thread_local: the thread that reads the next batch may pin memory meanwhile
        recording = torch.cuda.graph(graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local")
        with uncollected(), torch.cuda.device(device), _uncached(), recording:
            outputs = self.work(**held)
        self.inputs, self.outputs, self.graph = held, outputs, graph


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, no garbage is collected: a CUDA graph that is freed while another is captured spoils that capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def unowned(method: Work) -> Work:
    """The bound method, not keeping its object alive: for the object's own attributes.

    Without the cycle the memory of what owns a graph is free at once, not when the collector next comes by.
    """
    reference = WeakMethod(method)
    return lambda **inputs: reference()(**inputs)


def _uncached() -> torch.autocast:
    """Autocast as it is, but without its cache: copies of weights would die with the caller's block, not the graph.

    Compiled code is guarded by whether there is a cache: warm-up and capture run under the same.
    """
    return torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
    )


class SamplingEngine:
    """Images from scalars, batch after batch, at full speed.

        draw = SamplingEngine(model, precision="bf16", steps=20)
        images = draw(scalars)

    On a GPU all of it, from the bank over every step to the decoder, is one CUDA graph for each batch size, captured at
    the second call of that size; batches are filled up to a power of two, so that few graphs serve all. Elsewhere it is
    `EncDiff.sample`. The parameters must stay where they are: make a new engine after `model.to(...)`.

    precision: "bf16" lets a bfloat16 copy of the U-Net compute, as it is now; x, bank and decoder stay as they are.
    `options` are those of `EncDiff.sample`, without x_T and token_bias, which are given to the call, and progress.
    """

    def __init__(self, model: EncDiff, precision: Literal["float32", "bf16"] = "float32", **options):
        if precision not in ("float32", "bf16"):
            raise InputError(f"precision is {precision!r}, must be float32 or bf16")
        known = inspect.signature(EncDiff.sample).parameters.keys() - {
            "self",
            "scalars",
            "x_T",
            "token_bias",
            "progress",
        }
        if unknown := options.keys() - known:
            raise InputError(
                f"{min(unknown)} is no option of the engine, must be among {', '.join(sorted(known))}; "
                "x_T and token_bias are given to its calls"
            )
        self.model, self.options = _rounded(model) if precision == "bf16" else model, options
        self.graphs: dict[tuple, Graph] = {}

    @torch.no_grad()
    def __call__(self, scalars: Tensor, x_T: Tensor | None = None, token_bias: Tensor | None = None) -> Tensor:
        """scalars (B, N), and x_T (B, c, h, w) and token_bias (B, N) or None -> images (B, 3, S, S)."""
        given = {"scalars": scalars, "x_T": x_T, "token_bias": token_bias}
        given = {name: tensor.to(scalars.device) for name, tensor in given.items() if tensor is not None}
        for name, tensor in given.items():
            if len(tensor) != len(scalars):
                raise InputError(f"{name} has {len(tensor)} rows, must have {len(scalars)}, one for each of scalars")
        if scalars.device.type != "cuda" or not len(scalars):
            return self._sample(**given)[0]
        bucket = 1 << (len(scalars) - 1).bit_length()
        key = bucket, *((name, tensor.shape[1:], tensor.dtype) for name, tensor in given.items())
        graph = self.graphs.setdefault(key, Graph(unowned(self._sample), warm_up=1))
        images = graph(**{name: _fill_up(tensor, bucket) for name, tensor in given.items()})[0]
        return images[: len(scalars)].clone()  # the graph's own memory is written again by its next call

    def _sample(self, **given: Tensor) -> tuple[Tensor]:
        return (self.model.sample(**given, **self.options),)


def _rounded(model: EncDiff) -> EncDiff:
    """A copy with its U-Net in bfloat16, channels last; all else is the model's own."""
    shared = {id(part): part for part in (model.cond_stage_model, model.first_stage_model)}
    copied = copy.deepcopy(model, shared)
    copied.unet.to(torch.bfloat16).to(memory_format=torch.channels_last)
    return copied


def _fill_up(tensor: Tensor, rows: int) -> Tensor:
    """The tensor with its last row repeated, up to so many rows."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), *tensor.shape[1:])])


@contextmanager
def float32_precision(tf32: bool) -> Iterator[None]:
    """Inside, float32 products and convolutions on a GPU are rounded to TF32 (10 bits of mantissa), or are exact."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
