"""Our attention in other libraries' U-Nets: equal to theirs, and out of the way of whatever else is done to them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from _unets import FAMILIES, controlnet_of, inputs, ldm_unet, relative, unet_of
from torch import nn

import encdiff
from encdiff.errors import InputError
from encdiff.interop.patch import layers
from encdiff.ops import record_impls


def difference(unet, given, **options) -> float:
    """Between the stock U-Net's output and the patched one's, over the greatest value."""
    with torch.no_grad():
        expected = unet(**given).sample
        encdiff.patch(unet, **options)
        return relative(unet(**given).sample, expected)


def gradients(unet, given) -> list[torch.Tensor]:
    unet.zero_grad()
    sample, context = (given[name].detach().requires_grad_() for name in ("sample", "encoder_hidden_states"))
    unet(**given | {"sample": sample, "encoder_hidden_states": context}).sample.square().sum().backward()
    return [sample.grad, context.grad, *(p.grad for p in unet.parameters() if p.grad is not None)]


@pytest.mark.parametrize("self_attention", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_stock(family, self_attention):
    unet, given = unet_of(family), inputs(family)
    expected = gradients(unet, given)
    assert difference(unet, given, self_attention=self_attention) < 1e-5
    assert all(not layer.reasons for name, layer in layers(unet).items() if self_attention or name.endswith("attn2"))
    actual = gradients(unet, given)
    assert len(actual) == len(expected) and len(expected) > 50
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_every_served_attention_runs_by_the_op():
    unet, given = unet_of("sdxl"), inputs("sdxl")
    table = encdiff.patch(unet)
    with record_impls() as ran, torch.no_grad():
        unet(**given)
    assert len(ran) == sum(name.endswith("attn2") for name in table) == 8
    assert {op for op, _ in ran} == {"cross_attention"}


@pytest.mark.parametrize("tokens", [1, 77, 200])
def test_prompts_of_any_length(tokens):
    assert difference(unet_of("sd1"), inputs("sd1", tokens=tokens)) < 1e-5


def test_mask_of_tokens():
    unet, given = unet_of("sd1"), inputs("sd1")
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3:] = mask[1, 5:] = False
    masked = given | {"encoder_attention_mask": mask}
    assert difference(unet, masked) < 1e-5
    with record_impls() as ran, torch.no_grad():
        assert relative(unet(**given).sample, unet(**masked).sample) > 1e-3
    assert len(ran) == 8


def test_controlnet():
    unet, control, given = unet_of("sd1"), controlnet_of("sd1"), inputs("sd1")
    hint = torch.rand(2, 3, 32, 32)

    def run():
        with torch.no_grad():
            down, mid = control(**given, controlnet_cond=hint, return_dict=False)
            controlled = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
            return unet(**given, **controlled).sample

    expected = run()
    for net in (unet, control):
        encdiff.patch(net)
    with record_impls() as ran:
        assert relative(run(), expected) < 1e-5
    assert len(ran) == 4 + 2


def test_latent_diffusion_code():
    unet = ldm_unet()
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([3, 90]), torch.randn(2, 5, 4)
    with torch.no_grad():
        expected = unet(x, t, tokens)
        table = encdiff.patch(unet, self_attention=True)
        with record_impls() as ran:
            assert relative(unet(x, t, tokens), expected) < 1e-5
        assert len(ran) == len(table) and not any(layer.reasons for layer in table.values())
        encdiff.unpatch(unet)
        assert torch.equal(unet(x, t, tokens), expected)


class BasicTransformerBlock(nn.Module):
    """As latent-diffusion code has it: the work is in `_forward`, which `forward` may checkpoint."""

    def __init__(self, block):
        super().__init__()
        for name in ("attn1", "attn2", "norm1", "norm2", "norm3", "ff"):
            setattr(self, name, getattr(block, name))
        self.calls = 0

    def forward(self, x, context=None):
        self.calls += 1
        return self._forward(x, context)

    def _forward(self, x, context=None):
        x = self.attn1(self.norm1(x)) + x
        x = self.attn2(self.norm2(x), context=context) + x
        return self.ff(self.norm3(x)) + x


def test_what_checkpoints_goes_on_to():
    block = BasicTransformerBlock(next(m for m in ldm_unet().modules() if hasattr(m, "attn2")))
    x, tokens = torch.randn(2, 6, block.norm1.weight.numel()), torch.randn(2, 5, 4)
    expected = block(x, tokens)
    encdiff.patch(block)
    with record_impls() as ran:
        torch.testing.assert_close(block(x, tokens), expected, rtol=1e-4, atol=1e-5)
    assert (block.calls, len(ran)) == (2, 1)


def test_weights_are_shared_and_names_stay(tmp_path):
    unet = unet_of("sd1")
    before = {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()}
    classes = [type(module).__name__ for module in unet.modules()]
    encdiff.patch(unet)
    assert {name: tensor.data_ptr() for name, tensor in unet.state_dict().items()} == before
    assert [type(module).__name__ for module in unet.modules()] == classes  # `compile_repeated_blocks` looks for names
    unet.save_pretrained(tmp_path)
    again, given = type(unet).from_pretrained(tmp_path).eval(), inputs("sd1")
    with torch.no_grad():
        assert relative(unet(**given).sample, again(**given).sample) < 1e-5


@pytest.mark.parametrize("made", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))], ids=["copy", "pickle"])
def test_copies_are_patched_and_apart(made):
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    with torch.no_grad():
        expected = unet(**given).sample  # leaves the prompt's keys and values
        copied = made(unet)
        with record_impls() as ran:
            assert torch.equal(copied(**given).sample, expected)
        assert len(ran) == 4
        encdiff.unpatch(unet)
        with record_impls() as ran:
            copied(**given)
        assert len(ran) == 4 and "encdiff.ops" in encdiff.explain(copied)


def test_unpatch_restores():
    unet, given = unet_of("sd1"), inputs("sd1")
    expected = unet(**given).sample
    state_before = [(type(module), sorted(vars(module))) for module in unet.modules()]
    encdiff.patch(unet, self_attention=True)
    encdiff.patch(unet)  # once more changes what was asked for
    encdiff.unpatch(unet)
    encdiff.unpatch(unet)
    assert [(type(module), sorted(vars(module))) for module in unet.modules()] == state_before
    assert torch.equal(unet(**given).sample, expected)


def test_compiles_whole():
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad():
        expected = unet(**given).sample
        encdiff.patch(unet)
        compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
        assert relative(compiled(**given).sample, expected) < 1e-5


def test_repeated_blocks_compile():
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad():
        expected = unet(**given).sample
        encdiff.patch(unet)
        unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        assert all(m._compiled_call_impl for m in unet.modules() if hasattr(m, "attn2"))
        assert relative(unet(**given).sample, expected) < 1e-5


def rms_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of all numbers: the greatest error of one is another on every processor."""
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_stock(dtype):
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad():
        exact = unet(**given).sample
        rounded = {name: t.to(dtype) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
        stock = rms_error(unet.to(dtype)(**rounded).sample.float(), exact)
        encdiff.patch(unet)
        ours = unet(**rounded).sample
    assert ours.dtype == dtype
    assert rms_error(ours.float(), exact) < 1.15 * stock


def test_autocast():
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad():
        exact = unet(**given).sample
        with torch.autocast("cpu", torch.bfloat16):
            stock = rms_error(unet(**given).sample.float(), exact)
            encdiff.patch(unet)
            assert rms_error(unet(**given).sample.float(), exact) < 1.15 * stock


@pytest.mark.parametrize("slices", ["auto", "max", 1])
def test_attention_slicing_changes_nothing(slices):
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet, self_attention=True)
    with torch.no_grad():
        expected = unet(**given).sample
        unet.set_attention_slice(slices)
        with record_impls() as ran:
            assert torch.equal(unet(**given).sample, expected)
        assert len(ran) == 8
        encdiff.unpatch(unet)
        assert relative(unet(**given).sample, expected) < 1e-5


def test_feed_forward_in_chunks_and_checkpoints():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    expected = gradients(unet, given)
    unet.set_attn_processor({name: processor for name, processor in unet.attn_processors.items()})
    unet.enable_gradient_checkpointing()
    unet.train()
    for module in unet.modules():
        if hasattr(module, "set_chunk_feed_forward") and hasattr(module, "norm3"):
            module.set_chunk_feed_forward(64, 1)
    for ours, theirs in zip(gradients(unet, given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


class LoRA(nn.Module):
    """What adapters make of a Linear."""

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer, self.down = base_layer, nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def test_layers_with_adapters_stay_with_their_library():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    plain = attn.to_v
    attn.to_v = LoRA(plain)
    with torch.no_grad():
        with record_impls() as ran:
            patched = unet(**given).sample
        assert len(ran) == 3
        assert "mid_block.attentions.0.transformer_blocks.0.attn2" in layers(unet)
        assert layers(unet)["mid_block.attentions.0.transformer_blocks.0.attn2"].reasons == [
            "to_v: test_patch.LoRA, not a plain torch Linear"
        ]
        encdiff.unpatch(unet)
        assert relative(patched, unet(**given).sample) < 1e-5
        encdiff.patch(unet)
        attn.to_v = plain
        with record_impls() as ran:
            unet(**given)
        assert len(ran) == 4, "a plain layer again"


class Doubling:
    """A processor of the user's own."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        return 2 * attn.to_out[0](attn.to_v(encoder_hidden_states).mean(1, keepdim=True).expand_as(hidden_states))


def hook(attn) -> None:
    attn.to_k.register_forward_hook(lambda module, args, output: 2 * output)


def processor(attn) -> None:
    attn.set_processor(Doubling())


def offload(attn) -> None:
    attn.to_q.forward = lambda x: F.linear(x, 3 * attn.to_q.weight)


def scale(attn) -> None:
    attn.rescale_output_factor = 2.0


@pytest.mark.parametrize("change, said", [
    (hook, "a hook on it"), (processor, "its processor is test_patch.Doubling"), (offload, "a hook on it"),
    (scale, "it has rescale_output_factor"),
])  # fmt: skip
def test_what_we_do_not_compute_is_left_alone(change, said):
    unet, given = unet_of("sd1"), inputs("sd1")
    change(unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2)
    assert difference(unet, given) < 1e-5
    assert said in encdiff.explain(unet)
    with record_impls() as ran:
        unet(**given)
    assert len(ran) == 3


def test_dropout_in_training():
    unet = unet_of("sd1", dropout=0.0)
    encdiff.patch(unet)
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    unet.train()
    assert "it drops out in training" in encdiff.explain(unet)
    unet.eval()
    assert "drops" not in encdiff.explain(unet)


def test_our_own_runs_by_the_ops_as_it_is(model):
    table = encdiff.patch(model)
    assert table and not any(layer.reasons for layer in table.values())
    assert encdiff.explain(model).startswith(f"{len(table)} of {len(table)} attentions run by encdiff.ops")


def test_explain_tells_of_ops_as_before():
    assert "reference" in encdiff.explain("cross_attention")


def test_bad_input():
    unet = unet_of("sd1")
    with pytest.raises(InputError, match=r"unet is a Linear, must have cross-attention"):
        encdiff.patch(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"unet is a dict, must be a U-Net, or a model or pipeline that has one"):
        encdiff.patch({"unet": unet})
    encdiff.patch(unet, impl="triton")
    with pytest.raises(InputError, match=r"impl='triton' cannot serve this input: 1100 tokens must be 1 to"):
        unet(**inputs("sd1", tokens=1100))


def test_simple_cross_attention_is_said_to_be_missing():
    """Blocks that attend by added keys and values have no transformer."""
    diffusers = pytest.importorskip("diffusers", reason="the U-Net is diffusers'")
    unet = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    with pytest.raises(InputError, match=r"unet is a UNet2DModel, must have cross-attention"):
        encdiff.patch(unet)
