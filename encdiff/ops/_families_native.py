"""What of the native engine is checked: noise on CPU and GPU, attention on the CPU. See `_families`."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from encdiff.ops import _native
from encdiff.ops._attention import merge_heads, native_attention, split_heads
from encdiff.ops._check import TYPES, Draw, Family, Outputs, Tensors, Variant
from encdiff.ops.noise import TARGETS, q_sample_reference, step_reference
from encdiff.ops.philox import normal_reference, uniform_reference

SHAPE = (5, 3, 7, 9)  # no multiple of what a vector or a thread takes


def _steps(x: Tensor) -> Tensor:
    """A timestep for each sample."""
    return torch.arange(len(x), device=x.device) * 190


def _q_sample(draw: Draw, dtype: str, prediction: str, drawn: bool) -> Tensors:
    inputs = {"x0": draw(*SHAPE).to(TYPES[dtype])}
    return inputs if drawn else inputs | {"noise": draw(*SHAPE).to(TYPES[dtype])}


def _q_sample_with(op):
    def run(i: Tensors, dtype: str, prediction: str, drawn: bool) -> Outputs:
        x0, alpha_bar = i["x0"], torch.linspace(0.999, 0.01, 1000, dtype=torch.float64, device=i["x0"].device)
        key = {"seed": 3, "sample_ids": _steps(x0), "draw": 2} if drawn else {}
        return op(x0, i.get("noise"), _steps(x0), alpha_bar, prediction, **key)[:2]

    return run


def _q_sample_variants() -> Iterator[Variant]:
    yield from product(TYPES, TARGETS, (False, True))


def _step(draw: Draw, dtype: str, everything: bool, drawn: bool) -> Tensors:
    names = ["x_t", "output"] + ["unconditional", "past"] * everything + ["noise"] * (not drawn)
    return {n: draw(*SHAPE).to(TYPES[dtype]) for n in names}


def _step_with(op):
    def run(i: Tensors, dtype: str, everything: bool, drawn: bool) -> Outputs:
        x, history = i["x_t"], (i["past"],) if everything else ()
        coefficients = torch.linspace(0.2, 1.1, len(x) * (5 + len(history)), dtype=torch.float64)
        options = {"seed": 3, "sample_ids": _steps(x), "draw": 2} if drawn else {"noise": i["noise"]}
        options |= {"unconditional": i["unconditional"], "guidance": 1.5} if everything else {}
        coefficients = coefficients.view(len(x), -1).to(x.device, torch.float32)
        return op(x, i["output"], coefficients, history=history, return_x0=True, **options)

    return run


def _step_variants() -> Iterator[Variant]:
    yield from product(TYPES, (False, True), (False, True))


def _random(draw: Draw, dtype: str, kind: str) -> Tensors:
    return {"like": draw(*SHAPE).to(TYPES[dtype])}


def _random_with(op):
    def run(i: Tensors, dtype: str, kind: str) -> Outputs:
        like = i["like"]
        return (op(kind)(SHAPE, 3, _steps(like), 2, like.dtype),)

    return run


def _random_variants() -> Iterator[Variant]:
    yield from product(TYPES, ("normal", "uniform"))


def _native_random(kind: str):
    return lambda shape, seed, ids, draw, dtype: _native.random(kind, shape, seed, ids, draw, dtype, 0)


def _attention(draw: Draw, dtype: str, width: int) -> Tensors:
    shapes = {"q": (2, 19, 3 * width), "k": (2, 21, 3 * width), "v": (2, 21, 3 * width)}
    return {n: draw(*shape).to(TYPES[dtype]) for n, shape in shapes.items()}


def _attention_exact(i: Tensors, dtype: str, width: int) -> Outputs:
    q, k, v = (split_heads(i[n], 3) for n in "qkv")
    return (merge_heads((q @ k.mT * width**-0.5).softmax(-1) @ v),)


def _attention_variants() -> Iterator[Variant]:
    yield from product(("float32", "bfloat16"), (1, 8, 16, 24, 32, 64))


FAMILIES = {family.name: family for family in [
    Family("native q_sample", _q_sample_variants, _q_sample, _q_sample_with(_native.q_sample),
           _q_sample_with(q_sample_reference)),
    Family("native step", _step_variants, _step, _step_with(_native.step), _step_with(step_reference)),
    Family("native random", _random_variants, _random, _random_with(_native_random),
           _random_with({"normal": normal_reference, "uniform": uniform_reference}.get), differentiable=False),
    Family("native attention", _attention_variants, _attention,
           lambda i, dtype, width: (native_attention(i["q"], i["k"], i["v"], 3),), _attention_exact, products=True),
]}  # fmt: skip
ON_GPU = ("native q_sample", "native step", "native random")
