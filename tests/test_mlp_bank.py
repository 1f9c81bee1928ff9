import itertools

import pytest
import torch
from _golden import draw, fill, load, relative_error
from _place import GPU, interpreted
from torch import nn

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.tokens import MLPBank

pytestmark = pytest.mark.on_gpu

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


@pytest.mark.on_cpu
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
    with pytest.raises(InputError, match=r"scalars is torch.int64, must be floating point"):
        ops.mlp_bank(torch.zeros(2, 3, dtype=torch.int64), weights, biases)
    with pytest.raises(InputError, match="layer 0 is on meta and cpu, must be on scalars' device cpu"):
        ops.mlp_bank(torch.zeros(2, 3), [weights[0].to("meta"), weights[1]], biases)
    with pytest.raises(InputError, match="2 weights and 1 biases"):
        ops.mlp_bank(torch.zeros(2, 3), weights, biases[:1])
    with pytest.raises(InputError, match="scalars has 1 of 6 values that are not finite"):
        ops.mlp_bank(torch.tensor([[0.0, 1.0, 2.0], [3.0, torch.inf, 5.0]]), weights, biases, check=True)


CASES = {  # (B, N, widths from the slice to the token, activation)
    "paper's widths": (5, 2, (1, 64, 128, 16), "elu"),
    "odd widths": (19, 3, (1, 7, 21, 5), "gelu"),
    "slices": (3, 2, (3, 17, 33, 18), "silu"),
    "one hidden layer": (35, 2, (1, 40, 16), "relu"),
    "slices, one hidden layer": (2, 1, (16, 5, 33), "elu"),
    "widest": (2, 1, (16, 128, 20, 64), "silu"),
    "empty batch": (0, 2, (1, 4, 6, 3), "elu"),
}


def leaves(B, N, widths, dtype=torch.float32, shared=False):
    """[scalars, weights..., biases...], each of which wants a gradient."""
    mlps = 1 if shared else N
    tensors = [torch.randn(B, N, widths[0])] if widths[0] > 1 else [torch.randn(B, N)]
    tensors += [torch.randn(mlps, o, i) / i**0.5 for i, o in zip(widths, widths[1:], strict=False)]
    tensors += [torch.randn(mlps, o) for o in widths[1:]]
    return [t.to(dtype).requires_grad_() for t in tensors]


def run(tensors, activation, impl, upstream=None):
    """[tokens, gradient of every leaf]."""
    scalars, *parameters = tensors
    half = len(parameters) // 2
    tokens = ops.mlp_bank(scalars, parameters[:half], parameters[half:], activation, impl=impl)
    upstream = torch.ones_like(tokens) if upstream is None else upstream.to(tokens.dtype)
    return [tokens, *torch.autograd.grad(tokens, tensors, upstream)]


def in_storage_type(tensors, activation, upstream):
    """The bank as PyTorch computes it where everything stays in its storage type."""
    scalars, *parameters = tensors
    half = len(parameters) // 2
    h = scalars if scalars.ndim == 3 else scalars[..., None]
    for layer, (w, b) in enumerate(zip(parameters[:half], parameters[half:], strict=True)):
        h = h if layer == 0 else ACTIVATIONS[activation]()(h)
        h = torch.einsum("bni,noi->bno", h, w) + b
    return [h, *torch.autograd.grad(h, tensors, upstream.to(h.dtype))]


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@pytest.fixture
def nan_memory():
    """Fresh memory holds NaN, so that whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_triton_against_float64(case, nan_memory):
    B, N, widths, activation = CASES[case]
    tensors = leaves(B, N, widths)
    upstream = torch.randn(B, N, widths[-1])
    with ops.record_impls() as ran:
        actual = run(tensors, activation, "triton", upstream)
    assert ran == [("mlp_bank", "triton")]
    exact = run([t.detach().double().requires_grad_() for t in tensors], activation, "reference", upstream)
    stock = in_storage_type(tensors, activation, upstream)
    for a, s, e in zip(actual, stock, exact, strict=True):
        assert a.shape == e.shape and a.dtype == torch.float32
        assert error(a, e) <= 2 * error(s, e) + 1e-7, (error(a, e), error(s, e))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_triton_in_16_bits(dtype, nan_memory):
    tensors, upstream = leaves(19, 2, (1, 17, 33, 5), dtype), torch.randn(19, 2, 5)
    actual = run(tensors, "elu", "triton", upstream)
    exact = run([t.detach().double().requires_grad_() for t in tensors], "elu", "reference", upstream.to(dtype))
    # the interpreter cuts bfloat16 off instead of rounding: up to two units of the last place for each one half
    ulp = torch.finfo(dtype).eps
    for a, s, e in zip(actual, in_storage_type(tensors, "elu", upstream), exact, strict=True):
        assert a.dtype == dtype
        assert error(a, e) <= max(2 * error(s, e), ulp), (error(a, e), error(s, e))


def test_triton_reads_mixed_types():
    tensors = leaves(4, 2, (1, 5, 7, 3))
    tensors[0] = tensors[0].detach().half().requires_grad_()
    actual, expected = (run(tensors, "silu", impl) for impl in ("triton", "reference"))
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=1e-3 if a.dtype == torch.float16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("m", [1, 3])
def test_shared_weights_equal_repeated_ones(m, impl):
    one = leaves(6, 4, (m, 5, 7, 3), shared=True)
    each = [one[0], *(t.detach().repeat(4, *[1] * (t.ndim - 1)).requires_grad_() for t in one[1:])]
    actual, expected = run(one, "elu", impl), run(each, "elu", "reference")
    torch.testing.assert_close(actual[:2], expected[:2])
    torch.testing.assert_close(actual[2:], [g.sum(0, keepdim=True) for g in expected[2:]])


def test_triton_leaves_what_surrounds_its_inputs_alone():
    """Scalars with strides, everything between NaN, an upstream gradient without memory of its own."""
    tensors = leaves(9, 3, (2, 5, 6, 4))
    expected = run(tensors, "elu", "reference")
    padded = torch.full((11, 3, 2, 7), torch.nan)
    padded[1:10, ..., 3] = tensors[0].detach()
    surrounded = [padded[1:10, ..., 3]]
    for t in tensors[1:]:
        memory = torch.full((t.numel() + 64,), torch.nan)
        surrounded.append(memory[32:-32].view(t.shape).copy_(t.detach()))
    scalars, *parameters = (t.requires_grad_() for t in surrounded)
    tokens = ops.mlp_bank(scalars, parameters[:3], parameters[3:], impl="triton")
    actual = torch.autograd.grad(tokens.sum(), [scalars, *parameters])
    torch.testing.assert_close([tokens, *actual], expected)


def test_triton_passes_on_what_is_not_finite():
    scalars, *parameters = (t.detach() for t in leaves(3, 2, (1, 4, 5, 3)))
    scalars[1, 0] = torch.nan
    for activation in ACTIVATIONS:
        tokens = ops.mlp_bank(scalars, parameters[:3], parameters[3:], activation, impl="triton")
        assert tokens[1, 0].isnan().all() and tokens.isnan().sum() == 3


def test_triton_twice_the_same_bits():
    tensors = leaves(70, 2, (1, 8, 40, 4))
    for a, b in zip(run(tensors, "elu", "triton"), run(tensors, "elu", "triton"), strict=True):
        assert torch.equal(a, b)


def test_triton_past_65_535_rows(nan_memory, monkeypatch):
    from encdiff.kernels import mlp_bank
    from encdiff.kernels.mlp_bank import Bank, Tile

    if not GPU:  # in its tiles the interpreter takes minutes; these are larger than it has room for
        monkeypatch.setattr(mlp_bank, "BLOCK_SUM", 16384)
        for name in ("forward_tile", "backward_tile"):
            monkeypatch.setattr(Bank, name, property(lambda _: Tile(4096, 16, 4)))
    tensors = leaves(65_537, 1, (1, 2, 3))
    torch.testing.assert_close(*(run(tensors, "relu", impl) for impl in ("triton", "reference")), rtol=1e-4, atol=1e-3)


def test_triton_with_256_concepts(nan_memory):
    scalars, *parameters = (t.detach() for t in leaves(2, 256, (1, 2, 3)))
    tokens = [ops.mlp_bank(scalars, parameters[:2], parameters[2:], impl=impl) for impl in ("triton", "reference")]
    torch.testing.assert_close(*tokens)


def test_elu_without_gradients():
    """It computes otherwise there: the same to float32, extreme values and those that are not finite included."""
    scalars = torch.tensor([0.0, -0.0, 1e-8, -1e-8, 1e4, -1e4, torch.inf, -torch.inf, torch.nan, 0.3, -0.3, -20.0])
    weights, biases = [torch.ones(1, 1, 1), torch.ones(1, 1, 1)], [torch.zeros(1, 1)] * 2
    tokens = ops.mlp_bank(scalars[:, None], weights, biases, "elu")
    expected = nn.ELU()(scalars.double())[:, None, None].float()
    torch.testing.assert_close(tokens, expected, rtol=1e-6, atol=1.2e-7, equal_nan=True)


@pytest.mark.parametrize("widths", [(1, 3, 2), (1, 3, 5, 2)], ids=["2 layers", "3 layers"])
@pytest.mark.parametrize("activation", ["elu", "relu"])
def test_units_that_pad_a_layer_stay_out_of_what_is_not_finite(activation, widths):
    """A unit that is not there has weight 0, and 0 times inf is no 0: forward and in every gradient."""
    tensors = [t.detach().abs().requires_grad_() for t in leaves(4, 3, widths)]  # no inf - inf among real units
    with torch.no_grad():
        tensors[0][0, 0], tensors[0][1, 1] = torch.inf, -torch.inf
    actual, expected = (run(tensors, activation, impl) for impl in ("triton", "reference"))
    tokens, dscalars = expected[:2]
    assert tokens[0, 0].isinf().all() and tokens[1:].isfinite().all() and dscalars.isfinite().all()
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_opcheck():
    from encdiff.kernels.mlp_bank import mlp_bank, mlp_bank_backward

    scalars, *parameters = leaves(2, 2, (2, 3, 4, 2))
    torch.library.opcheck(mlp_bank, (scalars, parameters[:3], parameters[3:], "elu"))
    plain = [t.detach() for t in (scalars, *parameters)]
    torch.library.opcheck(mlp_bank_backward, (torch.randn(2, 2, 2), plain[0], plain[1:4], plain[4:], "elu"))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_compiles_whole_with_a_dynamic_batch(impl):
    bank = MLPBank(2, 3, (4, 5))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda s: ops.mlp_bank(s, list(bank.weights), list(bank.biases), impl=impl),
                             backend=backend, fullgraph=True, dynamic=True)  # fmt: skip
    for batch in (7, 5, 9):
        scalars = torch.randn(batch, 2)
        tokens = compiled(scalars)
        tokens.sum().backward()
        torch.testing.assert_close(tokens, bank(scalars))
    assert len(graphs) == 1


@interpreted
def test_dispatch_says_why():
    scalars, *parameters = leaves(2, 2, (1, 3, 4, 2))
    arguments = (scalars, parameters[:3], parameters[3:])
    assert "mlp_bank: triton: interpreted on the CPU" in ops.explain("mlp_bank", *arguments)
    with ops.record_impls() as ran:
        ops.mlp_bank(*arguments)
    assert ran == [("mlp_bank", "reference")]


@pytest.mark.parametrize(
    "B, N, widths, dtype, reason",
    [
        (2, 2, (1, 3), torch.float32, "1 layer is one batched product: nothing to fuse"),
        (2, 2, (1, 3, 3, 3, 3), torch.float32, "4 layers, at most 3"),
        (2, 2, (17, 3, 3), torch.float32, "a slice is 17 wide, at most 16"),
        (2, 2, (1, 129, 3, 3), torch.float32, "the first of two hidden layers is 129 wide, at most 128"),
        (2, 2, (1, 3, 65), torch.float32, "a token is 65 wide, at most 64"),
        (2, 2, (1, 3, 3), torch.float64, "scalars is torch.float64"),
    ],
)
def test_triton_refuses(B, N, widths, dtype, reason):
    tensors = leaves(B, N, widths, dtype)
    with pytest.raises(InputError, match=f"impl='triton' cannot serve this input: .*{reason}"):
        run(tensors, "elu", "triton")
    run(tensors, "elu", None)


@pytest.mark.on_cpu
def test_triton_refuses_a_cpu_that_does_not_interpret(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    scalars, *parameters = leaves(2, 2, (1, 3, 4, 2))
    with pytest.raises(InputError, match="scalars is on cpu"):
        ops.mlp_bank(scalars, parameters[:3], parameters[3:], impl="triton")


def test_gate_covers_what_dispatch_can_choose():
    from encdiff.kernels.mlp_bank import BLOCKS, Bank, gate_cases

    from encdiff.ops.mlp_bank import FUSED_WIDTHS

    assert [max(sizes) for sizes in BLOCKS.values()] == list(FUSED_WIDTHS.values())
    gated = {(*(c.constexprs.get(f"BLOCK_{n}") for n in "MFDBH"), c.num_warps) for c in gate_cases()}
    for m, f, d in itertools.product((1, 3, 16), (0, 1, 16, 63, 64, 65, 128), (1, 5, 16, 17, 64)):
        bank = Bank(m, f, 33, d)
        for tile in (bank.forward_tile, bank.backward_tile):
            c = bank.constexprs(tile, "elu")
            assert (*(c[f"BLOCK_{n}"] for n in "MFDBH"), tile.num_warps) in gated


@pytest.mark.parametrize("m, shared", [(1, True), (3, False), (3, True)])
def test_bank_of_slices_and_shared_weights(m, shared):
    bank, other = (MLPBank(4, 5, (6, 7), slice_width=m, shared=shared) for _ in range(2))
    assert sum(name.endswith(".0.weight") for name in bank.state_dict()) == (1 if shared else 4)
    assert bank.state_dict()["0.0.weight"].shape == (6, m)
    other.load_state_dict(bank.state_dict())
    scalars = torch.randn(3, 4 * m)
    assert torch.equal(bank(scalars), other(scalars.view(3, 4, m)))


def test_gain_multiplies_the_weights_after_the_first_layer():
    torch.manual_seed(0)
    plain = MLPBank(3, 4)
    torch.manual_seed(0)
    gained = MLPBank(3, 4, gain=2.0)
    for layer, (one, other) in enumerate(zip(plain.weights, gained.weights, strict=True)):
        assert torch.equal(other, one * (2.0 if layer else 1.0))
    assert all(torch.equal(one, other) for one, other in zip(plain.biases, gained.biases, strict=True))
