import copy
import json

import pytest
import torch
from _golden import draw, fill, load, relative_error
from _place import interpreted
from _tiny import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from encdiff import EncDiff, ops
from encdiff.errors import InputError
from encdiff.models import attention
from encdiff.models import unet as unet_module
from encdiff.models.attention import TransformerBlock
from encdiff.models.unet import ResBlock, UNet, timestep_embedding

PREFIX = "model.diffusion_model."


def golden_unet(config: dict) -> UNet:
    factors = [2**level for level in range(len(config["channel_mult"]))]
    levels = [i for i, factor in enumerate(factors) if factor in config["attention_resolutions"]]
    return UNet(
        config["in_channels"], config["context_dim"], config["model_channels"], config["channel_mult"],
        config["num_res_blocks"], levels, config["num_heads"],
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ["unet_small", "unet_paper"])
def test_published_outputs_and_gradients(name, impl):
    golden = load(name)
    config = json.loads(str(golden["config"]))
    unet = fill(golden_unet(config), PREFIX)
    x = draw(f"{name}:x", golden["y"].shape).requires_grad_()
    tokens = draw(f"{name}:context", golden["grad_context"].shape).requires_grad_()
    with ops.use_impl(impl):
        y = unet(x, torch.from_numpy(golden["t"]), tokens)
    y.backward(draw(f"{name}:grad_out", y.shape))
    assert relative_error(y, golden["y"]) < 1e-4
    assert relative_error(x.grad, golden["grad_x"]) < 1e-3
    assert relative_error(tokens.grad, golden["grad_context"]) < 1e-3
    parameters = dict(unet.named_parameters())
    for key in (k for k in golden if k.startswith("grad:")):
        assert relative_error(parameters[key.removeprefix("grad:")].grad, golden[key]) < 1e-3, key


SMALL = dict(
    channels=2, context_width=4, width=8, multipliers=(1, 2), depth=1, attention_levels=(1,), heads=2, groups=4
)
VARIANTS = {
    "plain convolutions": dict(resample="conv"),
    "timestep added": dict(scale_shift=False),
    "attention in the middle only": dict(attention_levels=()),
    "one level": dict(multipliers=(1,), attention_levels=(0,)),
    "deep": dict(depth=2, transformer_depth=2, multipliers=(1, 2, 2)),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_have_shape_gradients_and_depend_on_every_input(variant):
    unet = UNet(**(SMALL | VARIANTS[variant]))
    for parameter in unet.parameters():
        if parameter.ndim > 1:  # some begin at zero
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    inputs = torch.randn(2, 2, 8, 12), torch.tensor([3, 700]), torch.randn(2, 5, 4)
    y = unet(*inputs)
    assert y.shape == (2, 2, 8, 12)
    for changed in ((inputs[0] + 1, *inputs[1:]), (inputs[0], inputs[1] + 50, inputs[2]), (*inputs[:2], inputs[2] + 1)):
        assert (unet(*changed) - y).abs().max() > 1e-4
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in unet.parameters())


def test_starts_at_zero_and_ignores_the_order_of_tokens():
    unet = UNet(**SMALL)
    x, t, tokens = torch.randn(2, 2, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 4)
    assert (unet(x, t, tokens) == 0).all()
    for parameter in unet.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    torch.testing.assert_close(unet(x, t, tokens), unet(x, t, tokens.flip(1)))


def test_maps_are_collected_in_order_with_their_shapes():
    unet, maps = UNet(**(SMALL | VARIANTS["deep"])), []
    unet(torch.randn(2, 2, 8, 12), torch.tensor([3, 700]), torch.randn(2, 5, 4), maps=maps)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 6, 5)] * 4 + [(2, 2, 3, 5)] * 2 + [(2, 4, 6, 5)] * 6
    for m in maps:
        torch.testing.assert_close(m.sum(-1), torch.ones(m.shape[:-1]))


def test_a_masked_token_has_no_influence():
    unet = UNet(**SMALL)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, tokens = torch.randn(2, 2, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 4)
    bias = torch.zeros(2, 5)
    bias[:, 1] = -torch.inf
    other = tokens.clone()
    other[:, 1] = 9.0
    assert torch.equal(unet(x, t, tokens, bias), unet(x, t, other, bias))
    assert not torch.equal(unet(x, t, tokens), unet(x, t, other))


def test_timestep_embedding():
    e = timestep_embedding(torch.tensor([0, 10]), 8)
    frequencies = torch.tensor([1, 0.1, 0.01, 0.001])
    torch.testing.assert_close(e[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    torch.testing.assert_close(e[1], torch.cat([(10 * frequencies).cos(), (10 * frequencies).sin()]))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(resample="pool"), "resample is 'pool', must be"),
        (dict(heads=3), "level 1 has 16 channels, must be a multiple of heads 3"),
        (dict(groups=5), "level 0 has 8 channels, must be a multiple of groups 5"),
        (dict(attention_levels=(0, 2)), r"attention_levels \(0, 2\) must lie in 0..1"),
        (dict(width=9), "width is 9, must be even"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(InputError, match=message):
        UNet(**(SMALL | change))


def drawn(**config) -> UNet:
    unet = UNet(**(SMALL | config))
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


def outcome(unet: UNet, dtype=torch.float64) -> dict[str, torch.Tensor]:
    """y and all gradients, from the same inputs each time; for channels-last features."""
    generator = torch.Generator().manual_seed(2)
    unet = copy.deepcopy(unet).to(dtype, memory_format=torch.channels_last)
    x, tokens, upstream = (
        torch.randn(s, generator=generator).to(dtype) for s in ((2, 2, 8, 12), (2, 5, 4), (2, 2, 8, 12))
    )
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = unet(x, torch.tensor([3, 700]), tokens.requires_grad_())
    y.backward(upstream)
    assert all(p.grad.stride() == p.stride() for p in unet.parameters()), "fused AdamW refuses such gradients"
    return {"y": y.detach(), "x": x.grad, "tokens": tokens.grad} | {n: p.grad for n, p in unet.named_parameters()}


def one_by_one(emb, blocks):
    """As the published code has it."""
    return [block.emb_layers(emb).chunk(1 + block.scale_shift, dim=1) for block in blocks]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_products_are_those_of_the_layers(variant, checkpoint, monkeypatch):
    """The timestep for all residual blocks, the tokens for all cross-attentions, 1x1 convolutions as products."""
    unet = drawn(**VARIANTS[variant])
    unet.checkpoint_activations = checkpoint
    monkeypatch.setattr(attention, "projecting_pays", lambda tokens: True)
    joined = outcome(unet)
    monkeypatch.setattr(attention, "projecting_pays", lambda tokens: False)
    monkeypatch.setattr(unet_module, "project_times", one_by_one)
    for module in (attention, unet_module):
        monkeypatch.setattr(module, "pointwise", lambda x, conv, residual=0: residual + conv(x))
    for name, expected in outcome(unet).items():
        torch.testing.assert_close(joined[name], expected, rtol=1e-9, atol=1e-11, msg=name)


@interpreted
def test_joined_products_of_the_kernels(monkeypatch):
    """As a GPU runs them, interpreted: against the references in float64."""
    unet = drawn()
    expected = outcome(unet)
    monkeypatch.setattr(attention, "projecting_pays", lambda tokens: True)
    with ops.use_impl("triton"), ops.record_impls() as ran:
        actual = outcome(unet, torch.float32)
    assert ("cross_attention", "triton") in ran
    for name, exact in expected.items():
        assert relative_error(actual[name], exact) < 1e-4, name


def test_folded_blocks_project_no_tokens(monkeypatch):
    unet, tokens = drawn(attention_levels=(0, 1)), torch.randn(2, 5, 4)
    monkeypatch.setattr(attention, "projecting_pays", lambda tokens: True)
    inputs = torch.randn(2, 2, 8, 8), torch.tensor([3, 700])
    before = unet(*inputs, tokens)
    sampling = attention.begin_sampling(tokens, unet.attending)
    cond = attention.Conditioning(tokens, sampling=sampling)
    projected = attention.project_tokens(cond, unet.attending)
    folded = [cond.folded(block.place) is not None for block in unet.attending]
    assert set(folded) == {True, False} and [pair is None for pair in projected] == folded
    torch.testing.assert_close(unet(*inputs, tokens, sampling=sampling), before)
    others = tokens.clone()  # equal, and not the tokens that were folded
    assert attention.Conditioning(others, sampling=sampling).folded(unet.attending[0].place) is None


def test_a_residual_block_projects_alone_what_it_is_not_given():
    block, x, emb = drawn().res_blocks[0], torch.randn(2, 8, 4, 4), torch.randn(2, 32)
    assert torch.equal(block(x, emb), block(x, unet_module.project_times(emb, [block])[0]))


def test_features_are_channels_last():
    unet, seen = drawn(), []
    for block in unet.res_blocks:
        block.register_forward_hook(
            lambda block, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
        )
    unet(torch.randn(2, 2, 8, 12), torch.tensor([3, 700]), torch.randn(2, 5, 4))
    assert seen and all(seen)


class Biases(TorchDispatchMode):
    """Of each convolution whether it adds a bias."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default:
            self.seen.append(args[2] is not None)
        return function(*args, **kwargs or {})


@interpreted
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("c_out, sample", [(16, None), (8, "down"), (8, "up")])
def test_a_residual_block_leaves_its_biases_to_kernels(c_out, sample, scale_shift):
    block = ResBlock(8, c_out, 12, scale_shift, 4, sample)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, emb = torch.randn(2, 8, 4, 6).to(memory_format=torch.channels_last), torch.randn(2, 12)
    results = []
    for impl in ("triton", "reference"):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with ops.use_impl(impl), ops.record_impls() as ran, Biases() as biases:
            y = block(leaf, emb)
        assert (("residual_add", "triton") in ran) == (impl == "triton")
        assert biases.seen == ([not scale_shift, False] if impl == "triton" else [True, True])
        results.append([y, *torch.autograd.grad(y.square().sum(), (leaf, *block.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    for layers in (block.in_layers, block.out_layers):
        layers[-1].register_forward_hook(lambda layer, args, y: None)
    with ops.use_impl("triton"), Biases() as biases:
        block(x, emb)
    assert biases.seen == [True, True], "a hook sees all that its convolution makes"
    with torch.no_grad(), Biases() as biases:
        torch.testing.assert_close(block(x, emb), results[1][0])
    assert biases.seen == [True, True], "without a kernel the convolution adds it for nothing"


class Wrapped(torch.nn.Module):
    """As adapters such as LoRA's stand for a layer: its weights are there, its class is not."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return self.layer(x)


def test_a_layer_may_be_replaced_by_one_of_another_class():
    model = EncDiff(TINY).eval()
    images = torch.rand(2, 3, 16, 16)
    expected = model.loss(images, seed=3)
    for block in model.unet.attending:
        block.attn2.to_out[0] = Wrapped(block.attn2.to_out[0])
    for block in model.unet.res_blocks:
        block.in_layers[-1], block.emb_layers[1] = Wrapped(block.in_layers[-1]), Wrapped(block.emb_layers[1])
    model.encoder[0] = Wrapped(model.encoder[0])
    torch.testing.assert_close(model.loss(images, seed=3), expected)


def test_a_feed_forward_layer_is_what_stands_in_its_place():
    torch.manual_seed(0)
    block, x = TransformerBlock(16, 4, 2, True, 2), torch.randn(2, 5, 16)
    h = block.norm3(x)
    whole = block._feed(x)
    torch.testing.assert_close(whole, x + block.ff(h))
    seen = []
    handles = [m.register_forward_hook(lambda m, args, y: seen.append(m)) for m in block.ff.modules()]
    torch.testing.assert_close(block._feed(x), whole)
    assert set(map(id, seen)) == set(map(id, block.ff.modules()))
    for handle in handles:
        handle.remove()
    for place, other in ((1, torch.nn.Dropout(1.0)), (0, torch.nn.Linear(16, 32)), (2, Wrapped(block.ff.net[2]))):
        own, block.ff.net[place] = block.ff.net[place], other
        torch.testing.assert_close(block._feed(x), x + block.ff(h))
        block.ff.net[place] = own
    block.ff = torch.nn.Linear(16, 16)
    torch.testing.assert_close(block._feed(x), x + block.ff(h))
