"""The families of Triton kernels, and how each is checked: a new kernel is one more entry here.

The first of a variant is the type of the features; then come the types of what else is read, the sizes that choose a
tile, and flags. Where a tile serves many sizes, one stands for all: `representative` in the op's file names it. Inputs
are the smallest that leave the last program partly empty.
"""

from collections.abc import Iterator
from itertools import product

import torch

from encdiff.ops import _families_attention
from encdiff.ops._check import FAMILIES, TYPES, Draw, Family, Outputs, Tensors, Variant
from encdiff.ops.adamw import adamw_reference, adamw_triton
from encdiff.ops.column_sum import column_sum_reference, column_sum_triton
from encdiff.ops.column_sum import representatives as of_column_sum
from encdiff.ops.geglu import geglu_reference, geglu_triton
from encdiff.ops.group_norm import group_norm_reference, group_norm_triton
from encdiff.ops.group_norm import representatives as of_group_norm
from encdiff.ops.layer_norm import layer_norm_reference, layer_norm_triton
from encdiff.ops.mlp_bank import mlp_bank_reference, mlp_bank_triton
from encdiff.ops.projection import projection_reference, projection_triton
from encdiff.ops.resample import resample_reference, resample_triton
from encdiff.ops.residual_add import residual_add_reference, residual_add_triton

# of features and parameters: each type alone, and as under autocast
KINDS = [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")]


def _adamw(draw: Draw, gradient: str, weights: str, average: bool, scale: bool, aligned: bool) -> Tensors:
    n, k = (2064, 1040) if aligned else (2061, 1031)
    inputs = {"master": draw(n), "gradient": draw(n).to(TYPES[gradient]), "exp_avg": draw(n)}
    inputs |= {
        "exp_avg_sq": draw(n).abs(),
        "schedule": torch.tensor([1e-2, 0.3, 0.1, 0.05], dtype=torch.float32, device="cpu"),
    }
    inputs |= {"average": draw(k)} if average else {}
    inputs |= {"weights": torch.zeros(n, dtype=TYPES[weights], device="cpu")} if weights != "none" else {}
    return inputs | ({"scale": draw(1)[0].abs()} if scale else {})


def _adamw_with(op):
    def run(i: Tensors, *variant) -> Outputs:
        state = {n: t.clone() for n, t in i.items()}
        op(**state)
        return tuple(t for n, t in state.items() if n not in ("gradient", "schedule", "scale"))

    return run


def _adamw_variants() -> Iterator[Variant]:
    for kinds in (("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "none")):
        for scale, aligned in product((False, True), repeat=2):
            yield *kinds, True, scale, aligned


def _column_sum(draw: Draw, x: str, dtype: str, rows: int, columns: int) -> Tensors:
    return {"x": draw(rows, columns, shift=0.1).to(TYPES[x])}


def _column_sum_with(op):
    return lambda i, x, dtype, rows, columns: (op(i["x"], torch.float64 if i["x"].itemsize == 8 else TYPES[dtype]),)


def _column_sum_variants() -> Iterator[Variant]:
    for size in of_column_sum():
        yield "bfloat16", "bfloat16", *size
    for kinds in (("float32", "float32"), ("float16", "float16"), ("bfloat16", "float32")):
        for size in list(of_column_sum())[-4:]:
            yield *kinds, *size


def _geglu(draw: Draw, x: str, columns: int) -> Tensors:
    return {"x": draw(2 * max(1, 2048 // columns) + 1, 2 * columns).to(TYPES[x])}


def _geglu_with(op):
    return lambda i, *variant: (op(i["x"]),)


def _geglu_variants() -> Iterator[Variant]:
    from encdiff.kernels.geglu import BLOCKS

    for dtype, columns, lack in product(TYPES, BLOCKS, (0, 1)):
        yield dtype, columns - lack


def _group_norm(draw: Draw, x: str, weight: str, L: int, C: int, groups: int, *flags: bool) -> Tensors:
    """`flags`: scale, shift, silu, x_bias, with_input."""
    inputs = {"x": draw(3, C, L, 1, scale=2, shift=1).to(TYPES[x], memory_format=torch.channels_last)}
    inputs |= {"weight": draw(C, scale=0.1, shift=1).to(TYPES[weight]), "bias": draw(C).to(TYPES[weight])}
    given = {"scale": draw(3, C, scale=0.3), "shift": draw(3, C)}
    inputs |= {n: t.to(TYPES[x]) for (n, t), flag in zip(given.items(), flags, strict=False) if flag}
    return inputs | ({"x_bias": draw(C).to(TYPES[weight])} if flags[3] else {})


def _group_norm_with(op):
    def run(i: Tensors, x, weight, L, C, groups, scale, shift, silu, x_bias, with_input) -> Outputs:
        options = {n: i[n] for n in ("scale", "shift", "x_bias") if n in i} | {"silu": silu}
        if with_input and op is group_norm_triton:
            return op(i["x"], i["weight"], i["bias"], groups, **options, with_input=True)
        y = op(i["x"], i["weight"], i["bias"], groups, **options)
        return (y, i["x"].clone()) if with_input else (y,)

    return run


def _group_norm_variants() -> Iterator[Variant]:
    sizes = list(of_group_norm().values())
    for size, x_bias in product(sizes, (False, True)):
        yield *KINDS[1], *size, True, True, True, x_bias, not x_bias
    for kinds, size, x_bias in product((KINDS[0], KINDS[2], KINDS[3]), (sizes[0], sizes[-1]), (False, True)):
        yield *kinds, *size, True, True, True, x_bias, not x_bias
    for size in (sizes[0], sizes[-1]):
        yield *KINDS[1], *size, False, False, True, False, False


def _layer_norm(draw: Draw, x: str, weight: str, columns: int, aligned: bool, with_input: bool) -> Tensors:
    C, dtype = columns if aligned else columns - 1, TYPES[weight]
    inputs = {"x": draw(2 * max(1, 4096 // columns) + 1, C, scale=2, shift=1).to(TYPES[x])}
    return inputs | {"weight": draw(C, scale=0.1, shift=1).to(dtype), "bias": draw(C).to(dtype)}


def _layer_norm_with(op):
    def run(i: Tensors, x, weight, columns, aligned, with_input) -> Outputs:
        if with_input and op is layer_norm_triton:
            return op(i["x"], i["weight"], i["bias"], with_input=True)
        y = op(i["x"], i["weight"], i["bias"])
        return (y, i["x"].clone()) if with_input else (y,)

    return run


def _layer_norm_variants() -> Iterator[Variant]:
    from encdiff.kernels.layer_norm import BLOCKS

    for kinds in KINDS:
        for columns in BLOCKS if kinds == KINDS[1] else (64, 4096):
            yield *kinds, columns, True, True
    for kinds in KINDS[:2]:
        yield *kinds, 64, False, True
        yield *kinds, 64, True, False


def _mlp_bank(draw: Draw, x: str, weight: str, F: int, D: int, activation: str) -> Tensors:
    N, chain = 3, [3, *([F - 4] if F else []), 40, D - 3]
    inputs = {"scalars": draw(33, N, 3).to(TYPES[x])}
    for k, (i, o) in enumerate(zip(chain, chain[1:], strict=False)):
        inputs |= {f"w{k}": draw(N, o, i, scale=i**-0.5).to(TYPES[weight]), f"b{k}": draw(N, o).to(TYPES[weight])}
    return inputs


def _mlp_bank_with(op):
    def run(i: Tensors, x, weight, F, D, activation) -> Outputs:
        layers = range((len(i) - 1) // 2)
        return (op(i["scalars"], [i[f"w{k}"] for k in layers], [i[f"b{k}"] for k in layers], activation),)

    return run


def _mlp_bank_variants() -> Iterator[Variant]:
    from encdiff.kernels.mlp_bank import BLOCKS

    for kinds, F, D in product(KINDS[:3], BLOCKS["F"], BLOCKS["D"]):
        yield *kinds, F, D, "elu"
    for activation in ("silu", "gelu", "relu"):
        yield *KINDS[1], 64, 16, activation


def _projection(draw: Draw, x: str, depth: int, norm: bool, gated: bool, bias: bool, skip: bool) -> Tensors:
    """More than one step along rows that are not normalised, and parts of blocks of rows and columns."""
    M, K, N = 67, depth - 16 if norm else 2 * depth + 16, 80
    wide = N * (1 + gated)
    inputs = {"x": draw(M, K, scale=2, shift=1), "weight": draw(wide, K, scale=K**-0.5)}
    inputs |= {"bias": draw(wide)} if bias else {}
    inputs |= {"norm_weight": draw(K, scale=0.1, shift=1), "norm_bias": draw(K)} if norm else {}
    inputs |= {"residual": draw(M, N)} if skip else {}
    return {n: t.to(TYPES[x]) for n, t in inputs.items()}


def _projection_with(op):
    return lambda i, x, depth, norm, gated, bias, skip: (op(**i, gated=gated),)


def _projection_variants() -> Iterator[Variant]:
    from encdiff.kernels.projection import DEPTH, WIDTHS

    for dtype in ("bfloat16", "float16"):
        for width in WIDTHS:
            yield dtype, width, True, False, False, False
            yield dtype, width, True, True, True, False
        yield dtype, DEPTH, False, False, True, True


def _resample(draw: Draw, x: str, kind: str, aligned: bool) -> Tensors:
    """Of odd sizes on the way down: the way up is then checked by the gradients."""
    shape = 3, 72 if aligned else 67, 5, 7
    return {"x": draw(*shape).to(TYPES[x], memory_format=torch.channels_last), "beside": draw(*shape).to(TYPES[x])}


def _resample_with(op):
    return lambda i, x, kind, aligned: op(i["x"], kind, beside=i["beside"])


def _resample_variants() -> Iterator[Variant]:
    yield from product(TYPES, ("down", "up"), (True, False))


def _residual_add(draw: Draw, x: str, bias: str, columns: int) -> Tensors:
    maps = {n: draw(3, columns, 11, 1).to(TYPES[x], memory_format=torch.channels_last) for n in ("x", "h")}
    return maps | {"bias": draw(columns).to(TYPES[bias])}


def _residual_add_with(op):
    return lambda i, *variant: (op(i["x"], i["h"], i["bias"]),)


def _residual_add_variants() -> Iterator[Variant]:
    for kinds, columns in product(KINDS, (64, 63)):
        yield *kinds, columns


def _family(name, variants, make, run, kernel, exact, **options) -> Family:
    return Family(name, variants, make, run(kernel), run(exact), **options)


FAMILIES |= {family.name: family for family in [
    *_families_attention.FAMILIES,
    _family("mlp_bank", _mlp_bank_variants, _mlp_bank, _mlp_bank_with, mlp_bank_triton, mlp_bank_reference,
            products=True),
    _family("group_norm", _group_norm_variants, _group_norm, _group_norm_with, group_norm_triton, group_norm_reference),
    _family("layer_norm", _layer_norm_variants, _layer_norm, _layer_norm_with, layer_norm_triton, layer_norm_reference),
    _family("resample", _resample_variants, _resample, _resample_with, resample_triton, resample_reference),
    _family("geglu", _geglu_variants, _geglu, _geglu_with, geglu_triton, geglu_reference),
    _family("projection", _projection_variants, _projection, _projection_with, projection_triton, projection_reference,
            differentiable=False),
    _family("residual_add", _residual_add_variants, _residual_add, _residual_add_with, residual_add_triton,
            residual_add_reference),
    _family("column_sum", _column_sum_variants, _column_sum, _column_sum_with, column_sum_triton, column_sum_reference,
            differentiable=False),
    _family("adamw", _adamw_variants, _adamw, _adamw_with, adamw_triton, adamw_reference, differentiable=False),
]}  # fmt: skip
