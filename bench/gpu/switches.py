"""Block `switches`: the step and an evaluation as they are, and with one change taken back, in one process.

What a change brings is told by its absence. Two switches leave out work that is needed: they say what it costs at most.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from unittest.mock import patch

import torch

from bench.baselines import Rounded, fresh_model
from bench.clock import called, repeated, replayed
from bench.gpu.lab import Lab
from bench.gpu.sampling import _ours
from bench.gpu.steps import advance, lines, ours
from encdiff import ops
from encdiff.models import attention, unet
from encdiff.ops import _beside, _norms

__all__ = ["lines", "measure"]

Switch = Callable[[], list[AbstractContextManager]]
# modules whose names the package gives to functions
linear, cross, self_ = (sys.modules[f"encdiff.ops.{name}"] for name in ("linear", "cross_attention", "self_attention"))


def never(*_, **__) -> bool:
    return False


def no_sums() -> list[AbstractContextManager]:
    return [
        patch.object(linear.Ways, "sum", lambda *_: None),
        patch.object(_norms, "_into", lambda sinks, rows, parameters: [None] * len(parameters)),
    ]


def route(name: str) -> list[AbstractContextManager]:
    return [patch.object(cross, "choose_route", lambda *_: name)]


STEP: dict[str, Switch] = {
    "as it is": list,
    "biases by the convolutions": lambda: [
        patch.object(unet, name, never) for name in ("norm_takes_bias", "sum_takes_bias")
    ],
    "resampling by PyTorch": lambda: [patch.object(ops, "resample", partial(ops.resample, impl="native"))],
    "residuals of products by PyTorch": lambda: [patch.object(linear, "adds", never)],
    "cross-attention folded everywhere": partial(route, "folded"),
    "cross-attention by heads everywhere": partial(route, "heads"),
    "as many inputs kept as there is work aside": lambda: [
        patch.object(_beside, "PENDING", 10**6), patch.object(_beside, "BYTES", 2**36)
    ],
    "without sums of biases (wrong)": no_sums,
    "without gradients of weights (wrong)": lambda: [
        *no_sums(), patch.object(linear.Ways, "product", lambda *_: None)
    ],
    "as it is, again": list,
}  # fmt: skip
SAMPLING: dict[str, Switch] = {
    "as it is": list,
    "products by cuBLAS": lambda: [patch.object(module, "projects", never) for module in (self_, attention)],
}


def measure(lab: Lab) -> dict:
    """Seconds of a step, of a U-Net without gradients and of an evaluation of ten, with each switch."""
    found: dict[str, dict] = {"seconds": {}}
    options = {"masters": True, "precision": "bf16", "engine": "eager" if lab.cpu else "graph"}
    for name, switch in STEP.items():
        with turned(switch):
            found["seconds"][f"step {name}"] = repeated(advance(ours(lab, **options), lab), lab.device)
        lab.save("switches", found)
        if not lab.cpu:
            torch.cuda.empty_cache()
    model = fresh_model(lab.config, lab.device).eval()
    x, t = (
        torch.randn(lab.batch, *model.latent_shape).to(lab.device),
        torch.randint(1000, (lab.batch,)).to(lab.device),
    )
    tokens = torch.randn(lab.batch, lab.config.concepts, lab.config.token_width).to(lab.device)
    for name, switch in SAMPLING.items():
        with turned(switch), torch.no_grad():
            network = Rounded(model.unet)
            found["seconds"][f"U-Net {name}"] = replayed(lambda n=network: n(x, t, tokens), lab.device, calls=4)
            for batch in (lab.batch, 1):
                run, scalars = _ours(model, "bf16", 10), torch.randn(batch, lab.config.concepts).to(lab.device)
                seconds = called(lambda r=run, s=scalars, b=batch: r(s, x[:b]), lab.device, 4, 3)
                found["seconds"][f"evaluation, B={batch}, {name}"] = seconds / 10
        lab.save("switches", found)
    return found


def turned(switch: Switch) -> ExitStack:
    stack = ExitStack()
    for change in switch():
        stack.enter_context(change)
    return stack
