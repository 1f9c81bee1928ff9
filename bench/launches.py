"""Launches and bytes of one training step, one sampling evaluation and one sampling, counted on fake tensors.

    python -m bench.launches [--batch 128] [--ops] [--sites step|sampling]      # without a GPU

Every operator that reaches a CUDA device counts as the kernels that PyTorch launches for it, and as the bytes of its
inputs and outputs; views and allocations cost nothing, whatever lies in a cache counts as if it came from memory. A
step is encoder, bank, U-Net and loss, forward and backward, from latents and noise at hand. A sampling is what
`SamplingEngine` captures: bank, folding, evaluations, solver, decoder.
"""

import argparse
import os
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from bench.baselines import PAPER
from bench.published import Published
from encdiff import SamplingEngine
from encdiff.diffusion import loop, losses, menu
from encdiff.models import EncDiff, EncDiffConfig
from encdiff.models.attention import begin_sampling
from encdiff.ops import philox, use_impl

FORMS = ("published", "ours, autocast", "ours, bf16 weights")

# kernels of an operator where there is more than one (PyTorch 2.11, CUDA); ours as their launchers have them
# (those of column_sum: `_column_sum`)
KERNELS = {
    "encdiff::cross_attention_folded_bwd": 3,  # keys and values, x, the sum of the shares of the LayerNorm's
    "encdiff::fold_by_head": 2,
    "encdiff::fold_by_head_backward": 4,
    "encdiff::cross_attention_heads_bwd": 2,
    "encdiff::mlp_bank_backward": 2,
    "aten::baddbmm": 2,  # the addend is copied to where the product adds to it
    "aten::convolution": 1,  # and one for a bias, counted on its own
    "aten::native_group_norm": 3,
    "aten::native_group_norm_backward": 5,
    "aten::native_layer_norm_backward": 2,
    "aten::slice_backward": 2,
    "aten::select_backward": 2,
    "aten::_foreach_norm": 2,
}
FREE = {"detach", "alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

GROUPS = {
    "products": {"mm", "bmm", "addmm", "baddbmm", "projection", "fold_by_head", "fold_by_head_backward"},
    "GroupNorm": {"group_norm", "group_norm_backward", "native_group_norm", "native_group_norm_backward"},
    "LayerNorm": {"layer_norm", "layer_norm_backward", "native_layer_norm", "native_layer_norm_backward"},
    "GEGLU": {"geglu", "geglu_backward", "gelu", "gelu_backward"},
    "copies": {"clone", "copy_", "cat", "stack", "slice_backward", "select_backward"},
    "fills": {"zeros", "zeros_like", "ones_like", "new_zeros", "fill_", "zero_", "full", "full_like", "zero"},
    "adds": {"add", "add_", "residual_add"},
    "sums": {"sum", "column_sum", "sum_rows"},
    "activations": {"silu", "silu_backward", "relu", "relu_", "threshold_backward", "elu", "elu_backward"},
}
GROUP_OF = {op: group for group, ops in GROUPS.items() for op in ops}


class Cost(NamedTuple):
    """Kernels launched and bytes moved."""

    launches: int = 0
    bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.launches + other.launches, self.bytes + other.bytes)


class Counting(TorchDispatchMode):
    """Adds up, by group and by operator, what runs inside."""

    def __init__(self):
        super().__init__()
        self.groups: dict[str, Cost] = {}
        self.ops: Counter[str] = Counter()
        self.sites: Counter[str] = Counter()
        self._node = ""  # of the backward that ran last: what adds up its results says no place of its own

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name = func._schema.name
        launched = outputs or name.startswith(("aten::_foreach", "aten::_fused", "encdiff_native::"))
        if not launched or name.startswith("prim") or func.is_view or name.split("::")[1] in FREE:
            return result
        for group, cost in _costs(name, args, inputs, outputs):
            self.groups[group] = self.groups.get(group, Cost()) + cost
            self.ops[f"{group}: {name}"] += cost.launches
            if torch.is_anomaly_enabled() and outputs:
                self.sites[f"{group}: {name} {tuple(outputs[0].shape)} {self._place()}"] += cost.launches
        return result

    def _place(self) -> str:
        """The innermost lines of the package that made this launch, or made the node of the backward that makes it."""
        node = torch._C._current_autograd_node()
        if node is None:
            return _lines(traceback.format_stack()) or f"a sum after {self._node}"
        self._node = f"{node.name()} {_lines(node.metadata.get('traceback_') or [])}"
        return self._node

    def total(self) -> Cost:
        return sum(self.groups.values(), Cost())


def _lines(stack: list[str], depth: int = 3) -> str:
    own = [re.search(r'encdiff/([^"]*)", line (\d+)', frame) for frame in stack if "bench/" not in frame]
    return " < ".join(f"{found[1]}:{found[2]}" for found in [f for f in own if f][: -depth - 1 : -1])


def _costs(name: str, args: tuple, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[tuple[str, Cost]]:
    op = name.split("::")[1]
    if op in ("convolution", "convolution_backward"):
        yield from _convolution(op, args, outputs)
        return
    moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
    launches = _column_sum(args[0]) if op == "column_sum" else KERNELS.get(name, 1)
    if op.startswith("_foreach") or op.startswith("_fused"):
        launches *= -(-len(args[0]) // 30)  # so many tensors fit a kernel's arguments
    yield _group(name, op, inputs, outputs), Cost(launches, moved)


def _column_sum(x: Tensor) -> int:
    """Kernels that sum the rows of x: one, or one more for what it leaves."""
    from encdiff.kernels.column_sum import shares

    return 2 if shares(*x.shape) > 1 else 1


def _group(name: str, op: str, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    if op.startswith("_foreach") or op.startswith("_fused"):
        return "updates"
    if op in ("_to_copy", "copy_") and inputs and {t.dtype for t in inputs} != {outputs[0].dtype}:
        return "casts"
    if op == "_to_copy":
        return "copies"
    if "attention" in op:
        return "attention"
    if re.search("resample|avg_pool|upsample", op):
        return "resampling"
    return GROUP_OF.get(op, "rest")


def _convolution(op: str, args: tuple, outputs: list[Tensor]) -> Iterator[tuple[str, Cost]]:
    weight = args[1] if op == "convolution" else args[2]
    group = "1x1 convolutions" if weight.shape[2:].numel() == 1 else "convolutions"
    if op == "convolution":
        x, weight, bias = args[:3]
        yield group, Cost(1, sum(map(_bytes, (x, weight, outputs[0]))))
        if bias is not None:
            yield "convolution biases", Cost(1, 2 * _bytes(outputs[0]))
        return
    dy, x, weight = args[:3]
    for wanted, moved in zip(args[-1][:2], ((dy, weight, x), (dy, x, weight)), strict=True):
        if wanted:
            yield group, Cost(1, sum(map(_bytes, moved)))
    if args[-1][2]:
        yield "convolution biases", Cost(1, _bytes(dy))


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


@contextmanager
def imagined_gpu() -> Iterator[None]:
    """Inside, tensors are fake, say that they are on a GPU no older than Ampere, and go to our Triton kernels.

    To PyTorch they lie on the CPU, which needs no build with CUDA; by autocast's lists of operators the two differ
    little.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, TRITON_INTERPRET="1"))
        stack.enter_context(mock.patch.object(FakeTensor, "is_cuda", property(lambda _: True)))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)))
        stack.enter_context(use_impl("triton"))
        stack.enter_context(FakeTensorMode())
        yield


@contextmanager
def imagined_model(form: str, config: EncDiffConfig) -> Iterator[nn.Module]:
    """A model in training mode, its weights channels-last and without values, on an imagined GPU."""
    with torch.device("meta"):
        model = Published(config) if form == "published" else EncDiff(config)
    with imagined_gpu():
        yield _place(model, torch.bfloat16 if form == "ours, bf16 weights" else None)


def _place(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """The parameters and buffers of a model of meta tensors, as tensors of the imagined GPU."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, t in tensors.items():
                if t is not None:
                    learnt = isinstance(t, nn.Parameter)
                    new = torch.empty(t.shape, dtype=(dtype if learnt else None) or t.dtype)
                    new = new.to(memory_format=torch.channels_last) if t.ndim == 4 else new
                    tensors[name] = nn.Parameter(new, t.requires_grad) if learnt else new
    return model


def count_step(form: str, config: EncDiffConfig = PAPER, batch: int = 128) -> Counting:
    """Of the loss, forward and backward."""
    with imagined_model(form, config) as model:
        images, (x_t, t, target) = _empty(batch, 3, config.image_size, config.image_size), _noised(config, batch)
        images = images.to(memory_format=torch.channels_last)
        with Counting() as counting:
            with torch.autocast("cpu", torch.bfloat16, enabled=form != "ours, bf16 weights"):
                loss = losses.diffusion_loss(_predict(model, images, x_t, t), target, config.loss, None)
            loss.backward()
    return counting


def _predict(model: nn.Module, images: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    if isinstance(model, Published):
        return model.unet(x_t, t, model.tokens(images))
    images = images.to(model.encoder[0].weight.dtype)  # `encode` would read the images to check them
    return model.denoise(x_t, t, model.tokens(model.encoder(images).unflatten(1, model.config.code_shape)))


def count_evaluation(form: str, config: EncDiffConfig = PAPER, batch: int = 128) -> Counting:
    """Of the U-Net's evaluation in a sampler, its tokens folded and its times projected before where that is ours."""
    with imagined_model(form, config) as model, torch.no_grad():
        model.eval()
        dtype = torch.bfloat16 if form == "ours, bf16 weights" else torch.float32
        (x_t, t, _), tokens = _noised(config, batch), _empty(batch, config.concepts, config.token_width, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            options = {}
            if form != "published":
                options["sampling"] = sampling = begin_sampling(tokens, model.unet.attending)
                sampling.times = model.unet.project(t[:1])
            with Counting() as counting:
                model.unet(x_t.to(dtype), t, tokens, **options)
    return counting


def count_sampling(steps: int = 10, config: EncDiffConfig = PAPER, batch: int = 128) -> Counting:
    """Of all that is captured of a sampling in bfloat16, by DDIM from given noise."""
    with torch.device("meta"):
        model = SamplingEngine(EncDiff(config).eval(), precision="bf16").model
    with imagined_gpu(), imagined_schedule(), torch.no_grad():
        _place(model)
        scalars, (x_T, _, _) = _empty(batch, config.concepts), _noised(config, batch)
        with Counting() as counting:
            model.sample(scalars, x_T=x_T, sampler="ddim", steps=steps)
    return counting


@contextmanager
def imagined_schedule() -> Iterator[None]:
    """Inside, a sampler's tables are made of real numbers on the host, and are on the imagined GPU then."""

    def stages(*args, own=menu.stages, **options):
        with _disable_current_modes():
            return own(*args, **options)

    def tables(stages, x, own=loop._tables):
        with _disable_current_modes():
            rows, times = own(stages, torch.empty(1, dtype=x.dtype))
        return [torch.empty(row.shape, dtype=row.dtype) for row in rows], torch.empty(times.shape, dtype=times.dtype)

    def constant(numbers, dtype, device):
        return torch.empty(len(numbers), dtype=dtype)

    replaced = {(menu, "stages"): stages, (loop, "_tables"): tables, (loop, "_constant"): constant}
    with ExitStack() as stack:
        for (module, name), function in replaced.items():
            stack.enter_context(mock.patch.object(module, name, function))
        stack.enter_context(mock.patch.object(philox, "readable", lambda _: False))
        yield


def count_update(config: EncDiffConfig = PAPER) -> Counting:
    """Of AdamW and the average as PyTorch's own fused forms do them, a tensor at a time."""
    with imagined_model("ours, autocast", config) as model:
        learnt = [p for p in model.parameters() if p.requires_grad]
        states = [[torch.empty_like(p) for p in learnt] for _ in range(3)]
        steps = [_empty() for _ in learnt]
        average = list(model.unet.parameters())
        with Counting() as counting, torch.no_grad():
            options = dict(lr=1e-3, beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8, amsgrad=False, maximize=False)
            torch._fused_adamw_(learnt, *states, [], steps, **options)
            torch._foreach_lerp_([torch.empty_like(p) for p in average], average, 0.1)
    return counting


def _noised(config: EncDiffConfig, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and the target; channels-first as `ops.q_sample` makes them."""
    side, channels = config.image_size // config.downsampling, 3
    x_t = _empty(batch, channels, side, side)
    return x_t, torch.empty(batch, dtype=torch.int64), torch.empty_like(x_t)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def table(title: str, counts: dict[str, Counting]) -> str:
    """Markdown: a row for each group, launches and megabytes for each form."""
    names = sorted({g for c in counts.values() for g in c.groups}, key=lambda g: -_most(counts.values(), g))
    lines = [f"| {title} | " + " | ".join(counts) + " |", "|---" * (1 + len(counts)) + "|"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(_cell(c.groups.get(name, Cost())) for c in counts.values()) + " |")
    return "\n".join([*lines, "| **all** | " + " | ".join(_cell(c.total()) for c in counts.values()) + " |"])


def _most(counts, group: str) -> int:
    return max(c.groups.get(group, Cost()).launches for c in counts)


def _cell(cost: Cost) -> str:
    return f"{cost.launches}, {cost.bytes / 1e6:.0f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--ops", action="store_true", help="list every operator of ours, too")
    parser.add_argument(
        "--sites", choices=["step", "sampling"], help="list every launch in bfloat16 with its shape and place"
    )
    options = parser.parse_args()
    if options.sites:
        with torch.autograd.set_detect_anomaly(True, check_nan=False):
            count = partial(count_step, FORMS[-1]) if options.sites == "step" else count_sampling
            sites = count(batch=options.batch).sites
        print(*(f"{n:5} {site}" for site, n in sorted(sites.items())), sep="\n")
        return
    works: dict[str, Callable] = {"training step": count_step, "sampling evaluation": count_evaluation}
    for title, count in works.items():
        counts = {form: count(form, batch=options.batch) for form in FORMS}
        print(table(title, counts), end="\n\n")
        if options.ops:
            for form, counting in counts.items():
                print(form, *(f"{n:5} {op}" for op, n in counting.ops.most_common()), sep="\n", end="\n\n")
    print(table("sampling, 10 evaluations", {FORMS[-1]: count_sampling(batch=options.batch)}), end="\n\n")
    print(table("optimiser and average", {"PyTorch's fused forms": count_update()}))


if __name__ == "__main__":
    main()
