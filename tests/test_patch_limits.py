"""What others have made of the blocks that `patch` knows by name: left alone, whenever it was done."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _unets import assert_as_stock, inputs, ldm_unet, relative, unet_of
from test_patch import LoRA
from torch import nn

import encdiff
from encdiff.errors import InputError
from encdiff.interop.patch import layers
from encdiff.ops import record_impls


def blocks_of(unet: nn.Module) -> list[nn.Module]:
    return [module for module in unet.modules() if hasattr(module, "attn2")]


def compiled(unet: nn.Module):
    return torch.compile(unet, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_adapters_and_compilation(before):
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    graph = compiled(unet)
    with torch.no_grad():
        if before:
            graph(**given)
        for block in blocks_of(unet):
            block.attn2.to_v = LoRA(block.attn2.to_v)
            block.attn2.to_v.weight = block.attn2.to_v.base_layer.weight  # as PEFT's layers have one
        actual = graph(**given).sample
    assert_as_stock(unet, given, actual)


def test_a_copy_compiles():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    with torch.no_grad():
        assert relative(compiled(copy.deepcopy(unet))(**given).sample, unet(**given).sample) < 1e-5


def test_a_copy_of_compiled_blocks_is_apart():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, copied = unet(**given).sample, copy.deepcopy(unet)
        for name, parameter in copied.named_parameters():
            if "ff." in name:
                parameter.mul_(3)
        assert relative(copied(**given).sample, expected) > 1e-2


def test_weights_merged_behind_pytorchs_back():
    """PEFT adds to `weight.data`, which no version counts; that the layer was another meanwhile is seen."""
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        unet(**given)
        plain, attn.to_v = attn.to_v, LoRA(attn.to_v)
        unet(**given)
        plain.weight.data += attn.to_v.up.weight @ attn.to_v.down.weight
        attn.to_v = plain
        actual = unet(**given).sample
    assert_as_stock(unet, given, actual)


def test_after_training_a_prompt_is_projected_anew():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    with torch.no_grad():
        unet(**given)
    unet(**given)
    for parameter in unet.parameters():
        parameter.data *= 1.1  # as averages of weights are put in
    with torch.no_grad():
        actual = unet(**given).sample
    assert_as_stock(unet, given, actual)


class AttnProcessor2_0:
    """Of the user, by a name that diffusers has, too."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        return attn.to_out[0](attn.to_v(encoder_hidden_states).mean(1, keepdim=True).expand_as(hidden_states))


def derived(method: str):
    """A subclass's subclass, of which the first has a method of its own."""

    def make(block: nn.Module) -> None:
        kind = type(block)
        first = type(
            "First",
            (kind,),
            {method: lambda self, x, *args, **kwargs: 2 * getattr(kind, method)(self, x, *args, **kwargs)},
        )
        block.__class__ = type("Second", (first,), {})

    return make


def own_processor(block: nn.Module) -> None:
    block.attn2.set_processor(AttnProcessor2_0())


def hooked(block: nn.Module) -> None:
    stock = block.forward
    block.forward = lambda *args, **kwargs: 2 * stock(*args, **kwargs)


def listened(block: nn.Module) -> None:
    block.attn2.to_out.append(nn.Identity())
    block.attn2.to_out[2].register_forward_hook(lambda module, args, output: 2 * output)


@pytest.mark.parametrize("change", [derived("forward"), own_processor, hooked], ids=["subclass", "processor", "hooked"])
def test_diffusers_blocks_that_do_something_else(change):
    unet, given = unet_of("sd1"), inputs("sd1")
    change(unet.mid_block.attentions[0].transformer_blocks[0])
    with torch.no_grad():
        expected = unet(**given).sample
        encdiff.patch(unet)
        with record_impls() as ran:
            assert relative(unet(**given).sample, expected) < 1e-5
    assert len(ran) == 3
    assert layers(unet)["mid_block.attentions.0.transformer_blocks.0.attn2"].reasons


def switched_off(block: nn.Module) -> None:
    block.disable_self_attn = True
    stock = type(block)

    def forward(self, x, context):
        x = self.attn1(self.norm1(x), None) * 0 + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x

    block.__class__ = type("BasicTransformerBlock", (stock,), {"forward": forward})


def further_parts(block: nn.Module) -> None:
    attn = block.attn2
    attn.q_norm = nn.LayerNorm(attn.to_q.out_features)
    stock = type(attn)

    def forward(self, x, context=None):
        q = F.layer_norm(self.to_q(x), (self.to_q.out_features,))
        return self.to_out(q + self.to_v(context).mean(1, keepdim=True))

    attn.__class__ = type("Normed", (stock,), {"forward": forward})


def longer_way_out(block: nn.Module) -> None:
    block.attn2.to_out.append(nn.LayerNorm(block.norm2.weight.numel()))


@pytest.mark.parametrize("change", [derived("forward"), switched_off, further_parts, longer_way_out, listened],
                         ids=["subclass", "switched off", "further parts", "longer way out", "listened"])  # fmt: skip
def test_latent_diffusion_blocks_that_do_something_else(change):
    unet = ldm_unet()
    x, t, tokens = torch.randn(2, 3, 8, 8), torch.tensor([3, 90]), torch.randn(2, 5, 4)
    change(blocks_of(unet)[0])
    with torch.no_grad():
        expected = unet(x, t, tokens)
        encdiff.patch(unet, self_attention=True)
        assert relative(unet(x, t, tokens), expected) < 1e-5
    first = next(iter(name for name in layers(unet) if name.endswith("attn2")))
    assert layers(unet)[first].reasons


def test_blocks_of_other_names_are_said_to_be_unknown():
    unet = ldm_unet()
    for block in blocks_of(unet):
        block.__class__ = type("MyBlock", (nn.Module,), {"forward": lambda self, x, context: x})
    assert "blocks of class MyBlock are unknown" in str(encdiff.patch(unet))


def test_blocks_that_attend_to_their_features_twice():
    """Of video models: attn2 without tokens is a self-attention."""
    diffusers = pytest.importorskip("diffusers.models.attention", reason="the block is diffusers'")
    block = diffusers.BasicTransformerBlock(16, 2, 8, double_self_attention=True).eval()
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = block(x)
        table = encdiff.patch(block)
        assert relative(block(x), expected) < 1e-6
    assert table["attn2"].reasons == ["it attends to the features, not to tokens"]


def test_functional_transforms():
    unet, given = unet_of("sd1"), inputs("sd1")
    prompts = torch.stack([given["encoder_hidden_states"], 2 * given["encoder_hidden_states"]])

    def run(prompt):
        return unet(given["sample"], given["timestep"], prompt).sample

    with torch.no_grad():
        expected = torch.func.vmap(run)(prompts)
        encdiff.patch(unet)
        assert relative(torch.func.vmap(run)(prompts), expected) < 1e-5


def test_an_unknown_implementation():
    with pytest.raises(InputError, match="implementation 'cuda!' must be 'auto' or one of"):
        encdiff.patch(unet_of("sd1"), impl="cuda!")
