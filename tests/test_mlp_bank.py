import pytest
import torch
from _golden import draw, fill, load, relative_error
from torch import nn

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.tokens import MLPBank

ACTIVATIONS = {"elu": nn.ELU, "silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU}


def test_published_outputs_and_gradients():
    golden = load("encoder_paper")
    bank = fill(MLPBank(), "cond_stage_model.net.")
    scalars = draw("bank:scalars", (5, 20)).requires_grad_()
    tokens = bank(scalars)
    tokens.backward(draw("bank:grad_out", (5, 20, 16)))
    assert relative_error(tokens, golden["bank_tokens"]) < 1e-4
    assert relative_error(scalars.grad, golden["bank_grad_scalars"]) < 1e-3
    for key in (k for k in golden if k.startswith("grad:")):
        concept, layer, kind = key.removeprefix("grad:net.").split(".")
        stacked = (bank.weights if kind == "weight" else bank.biases)[int(layer) // 2]
        assert relative_error(stacked.grad[int(concept)], golden[key]) < 1e-3, key


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("B, N, widths", [(5, 3, (4, 6, 2)), (1, 1, (7,)), (0, 4, (3, 2))])
def test_equals_separate_modules(B, N, widths, activation):
    bank = MLPBank(N, widths[-1], widths[:-1], activation).double()
    state = bank.state_dict()
    scalars = torch.randn(B, N, dtype=torch.float64)
    tokens = bank(scalars)
    assert tokens.shape == (B, N, widths[-1])
    for concept in range(N):
        layers = []
        for i, (c_in, c_out) in enumerate(zip((1, *widths), widths, strict=False)):
            layers += [ACTIVATIONS[activation]()] * (i > 0) + [nn.Linear(c_in, c_out)]
        mlp = nn.Sequential(*layers).double()
        mlp.load_state_dict({k.removeprefix(f"{concept}."): v for k, v in state.items() if k.startswith(f"{concept}.")})
        torch.testing.assert_close(tokens[:, concept], mlp(scalars[:, concept, None]))


def test_state_dict_round_trip_and_missing_names():
    one, other = MLPBank(3, 4), MLPBank(3, 4)
    other.load_state_dict(one.state_dict())
    scalars = torch.randn(6, 3)
    assert torch.equal(one(scalars), other(scalars))
    state = one.state_dict()
    del state["1.2.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_gradcheck():
    torch.manual_seed(0)
    scalars = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    parameters = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4, 1), (3, 2, 4), (3, 4), (3, 2))
    ]
    assert torch.autograd.gradcheck(lambda s, *p: ops.mlp_bank(s, p[:2], p[2:]), (scalars, *parameters))


def test_bad_input():
    weights, biases = [torch.zeros(3, 4, 1), torch.zeros(3, 2, 4)], [torch.zeros(3, 4), torch.zeros(3, 2)]
    with pytest.raises(InputError, match=r"layer 0 has weight \(3, 4, 1\) and bias \(3, 4\), must be \(5, out, 1\)"):
        ops.mlp_bank(torch.zeros(2, 5), weights, biases)
    with pytest.raises(InputError, match="layer 1"):
        ops.mlp_bank(torch.zeros(2, 3), weights[:1] * 2, biases)
    with pytest.raises(InputError, match="activation is 'tanh'"):
        ops.mlp_bank(torch.zeros(2, 3), weights, biases, "tanh")
    with pytest.raises(InputError, match=r"scalars is \(3,\)"):
        ops.mlp_bank(torch.zeros(3), weights, biases)
