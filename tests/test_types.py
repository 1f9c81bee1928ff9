"""A wrong type of any tensor of any op is an InputError that names it; another floating type works or is one, too."""

from itertools import product

import pytest
import torch
from torch import Tensor

from encdiff import ops
from encdiff.errors import InputError
from encdiff.ops.cross_attention_folded import Folded, cross_attention_folded

B, L, C, N, D, H, T = 2, 4, 8, 3, 6, 2, 10
WRONG = (torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

NORM = {"norm_weight": (C,), "norm_bias": (C,)}
ATTENTION = {"w_q": (C, C), "w_o": (C, C), "b_o": (C,)} | NORM
OPS = {  # of each the function, the shapes of its floating tensors, and its other arguments
    "adamw": (ops.adamw, {n: (5,) for n in ("master", "gradient", "exp_avg", "exp_avg_sq", "average", "weights")}
              | {"schedule": (4,), "scale": ()}, {}),
    "column_sum": (ops.column_sum, {"x": (L, C)}, {}),
    "conv2d": (ops.conv2d, {"x": (B, C, L, L), "weight": (D, C, 3, 3), "bias": (D,)}, {}),
    "cross_attention": (ops.cross_attention, {"x": (B, L, C), "context": (B, N, D), "w_k": (C, D), "w_v": (C, D)}
                        | ATTENTION | {"token_bias": (B, N)}, {"heads": H}),
    "plain": (ops.cross_attention, {"x": (B, L, C), "context": (B, N, D), "w_k": (C, D), "w_v": (C, D)} | ATTENTION,
              {"heads": H}),
    "projected": (lambda k, v, **given: ops.cross_attention(**given, projected=(k, v)),
                  {"x": (B, L, C), "context": (B, N, D), "w_k": (C, D), "w_v": (C, D), "k": (B, N, C), "v": (B, N, C)}
                  | ATTENTION, {"heads": H}),
    "folded": (lambda keys, values, **given: cross_attention_folded(folded=Folded(keys, values), **given),
               {"x": (B, L, C), "keys": (B, H, N, C), "values": (B, H, N, C), "b_o": (C,), "token_bias": (B, N)} | NORM,
               {}),
    "geglu": (ops.geglu, {"x": (B, 2 * C)}, {}),
    "group_norm": (ops.group_norm, {"x": (B, C, L, L), "weight": (C,), "bias": (C,), "scale": (B, C), "shift": (B, C),
                                    "x_bias": (C,)}, {"groups": 2}),
    "layer_norm": (ops.layer_norm, {"x": (B, C), "weight": (C,), "bias": (C,)}, {}),
    "linear": (ops.linear, {"x": (B, C), "weight": (D, C), "bias": (D,)}, {}),
    "mlp_bank": (lambda w0, w1, b0, b1, **given: ops.mlp_bank(weights=[w0, w1], biases=[b0, b1], **given),
                 {"scalars": (B, N), "w0": (N, D, 1), "w1": (N, C, D), "b0": (N, D), "b1": (N, C)}, {}),
    "projection": (ops.projection, {"x": (B, C), "weight": (D, C), "bias": (D,), "norm_weight": (C,), "norm_bias": (C,),
                                    "residual": (B, D)}, {}),
    "q_sample": (ops.q_sample, {"x0": (B, C), "noise": (B, C), "alphas_cumprod": (T,), "weights": (T,)},
                 {"t": torch.tensor([1, 2])}),
    "resample": (ops.resample, {"x": (B, C, L, L), "beside": (B, C, L, L)}, {"kind": "down"}),
    "residual_add": (ops.residual_add, {"x": (B, C, L, L), "h": (B, C, L, L), "bias": (C,)}, {}),
    "self_attention": (ops.self_attention, {"x": (B, L, C), "w_k": (C, C), "w_v": (C, C)} | ATTENTION, {"heads": H}),
    "step": (lambda past, **given: ops.step(**given, history=(past,)),
             {n: (B, C) for n in ("x_t", "model_output", "noise", "unconditional", "past")} | {"coefficients": (1, 6)},
             {}),
}  # fmt: skip
CASES = [(name, tensor) for name, (_, shapes, _) in OPS.items() for tensor in shapes]
NAMED = {"k": "projected", "v": "projected", "keys": "folded", "values": "folded", "past": "history"}
NAMED |= {"w0": "layer 0", "w1": "layer 1", "b0": "layer 0", "b1": "layer 1"}


def drawn(shapes: dict) -> dict[str, Tensor]:
    return {name: torch.rand(shape) * 0.5 + 0.1 for name, shape in shapes.items()}


def impls(name: str) -> tuple[str | None, ...]:
    op = {
        "plain": "cross_attention",
        "projected": "cross_attention",
        "folded": "cross_attention_folded",
    }
    found = ops.OPS.get(op.get(name, name))
    return (None, *(i.name for i in found.implementations if i.name != "triton")) if found else (None,)


@pytest.mark.parametrize("name, tensor", CASES, ids=[" ".join(case) for case in CASES])
def test_a_type_that_is_not_floating_is_refused_by_name(name, tensor):
    run, shapes, others = OPS[name]
    for dtype, impl in product(WRONG, impls(name)):
        given = drawn(shapes)
        with pytest.raises(InputError) as error:
            run(**given | {tensor: given[tensor].to(dtype)}, **others, impl=impl)
        assert str(dtype) in str(error.value) and NAMED.get(tensor, tensor) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, tensor", CASES, ids=[" ".join(case) for case in CASES])
def test_another_floating_type_works_or_is_refused(name, tensor):
    run, shapes, others = OPS[name]
    for dtype, impl in product(FLOATING, impls(name)):
        given = drawn(shapes)
        given[tensor] = given[tensor].to(dtype)
        try:
            y = run(**given, **others, impl=impl)
        except InputError as error:
            strict = name in ("conv2d", "linear", "adamw", "q_sample", "step") and dtype != torch.float32
            assert strict or "cannot serve" in str(error)  # some implementations do not take these inputs
        else:
            first = next(iter(given.values()))
            assert name == "adamw" or (y[0] if isinstance(y, tuple) else y).dtype == first.dtype


@pytest.mark.parametrize("draw", [ops.normal, ops.uniform])
def test_random_numbers_are_floating_and_keyed_by_integers(draw):
    ids = torch.arange(B)
    for dtype in WRONG:
        with pytest.raises(InputError, match="dtype is"):
            draw((B, C), 0, ids, dtype=dtype)
    for dtype in (*FLOATING, *WRONG[1:4], torch.int32):
        with pytest.raises(InputError, match="sample_ids is"):
            draw((B, C), 0, ids.to(dtype))
        with pytest.raises(InputError, match="draw is"):
            draw((B, C), 0, ids, torch.ones(()).to(dtype))
        with pytest.raises(InputError, match="out is"):
            draw((B, C), 0, ids, out=torch.empty(B, C).to(torch.int64 if dtype == torch.float32 else dtype))


def test_timesteps_and_tables_of_other_types():
    ids, x = torch.arange(B), torch.rand(B, C)
    for dtype in (torch.complex64, torch.bool, torch.float8_e4m3fn):
        with pytest.raises(InputError, match="weights is"):
            ops.timesteps(T, 0, ids, kind="importance", weights=torch.ones(T).to(dtype))
    counts = ops.timesteps(T, 0, ids, kind="importance", weights=torch.arange(T))
    assert torch.equal(counts, ops.timesteps(T, 0, ids, kind="importance", weights=torch.arange(T).double()))
    for dtype in (*FLOATING, torch.bool, torch.complex64, torch.uint8):
        with pytest.raises(InputError, match="t is"):
            ops.q_sample(x, x, torch.ones(B).to(dtype), torch.rand(T))
    for dtype in WRONG:
        with pytest.raises(InputError, match="dtype is"):
            ops.column_sum(x, dtype)
