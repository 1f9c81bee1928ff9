"""Maps of attention from the fused pass, against the formula on what each layer is given."""

import copy

import pytest
import torch
import torch.nn.functional as F
from _unets import FAMILIES, controlnet_of, inputs, ldm_unet, transformer, unet_of
from torch import nn

import encdiff
from encdiff.errors import InputError


def stock_maps(unet: nn.Module, given: dict) -> dict[str, torch.Tensor]:
    """By hooks on the stock U-Net: what goes into each attn2, and the softmax written out, (B, L, N)."""
    found, handles = {}, []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):

            def hook(attn, args, kwargs, name=name):
                context = kwargs["encoder_hidden_states"]
                q, k = (
                    t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (attn.to_q(args[0]), attn.to_k(context))
                )
                found[name] = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1)

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        unet(**given)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("size", [16, 15])
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_the_softmax(family, size):
    unet, given = unet_of(family), inputs(family, size=size)
    expected = stock_maps(unet, given)
    with encdiff.record_maps(unet) as maps, torch.no_grad():
        unet(**given)
    assert set(maps) == set(expected) and len(maps) == len(expected) and maps.evaluations == 1
    for name in maps:
        side = size if maps[name].shape[1] == size else -(-size // 2)
        assert maps[name].shape == (2, side, side, 7)
        torch.testing.assert_close(maps[name].flatten(1, 2), expected[name], rtol=1e-4, atol=1e-6)


def test_wide_images_keep_their_sides():
    unet, given = unet_of("sd1"), inputs("sd1")
    given["sample"] = torch.randn(2, 4, 8, 20)
    with encdiff.record_maps(unet) as maps, torch.no_grad():
        unet(**given)
    assert {tuple(maps[name].shape) for name in maps} == {(2, 8, 20, 7), (2, 4, 10, 7)}
    assert maps.mean().shape == (2, 7, 8, 20) and maps.mean(32).shape == (2, 7, 32, 32)


def test_mean_over_evaluations_is_that_of_each():
    unet, given = unet_of("sd1"), inputs("sd1")
    prompts = [given | {"sample": torch.randn(2, 4, 16, 16), "timestep": t} for t in (9, 5, 1)]
    with torch.no_grad():
        with encdiff.record_maps(unet) as maps:
            [unet(**prompt) for prompt in prompts]
        with encdiff.record_maps(unet, steps="each") as each:
            [unet(**prompt) for prompt in prompts]
    for name in maps:
        assert each[name].shape == (3, *maps[name].shape)
        assert not torch.equal(each[name][0], each[name][2])
        torch.testing.assert_close(maps[name], each[name].mean(0))
    torch.testing.assert_close(maps.mean(), each.mean())
    torch.testing.assert_close(maps.mean().sum(1), torch.ones(2, 16, 16))


def test_chosen_layers():
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad():
        with encdiff.record_maps(unet, layers="mid") as maps:
            unet(**given)
        assert list(maps) == ["mid_block.attentions.0.transformer_blocks.0.attn2"]
        with encdiff.record_maps(unet, layers=["mid", "down"]) as maps:
            unet(**given)
        assert len(maps) == 2


def test_a_block_leaves_the_unet_as_it_was():
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad():
        expected, classes = unet(**given).sample, [type(module) for module in unet.modules()]
        with pytest.raises(ZeroDivisionError), encdiff.record_maps(unet):
            1 / 0  # noqa: B018
        assert [type(module) for module in unet.modules()] == classes and not unet._forward_pre_hooks
        assert torch.equal(unet(**given).sample, expected)
        encdiff.patch(unet)
        with encdiff.record_maps(unet) as maps:
            unet(**given)
        unet(**given)
        assert maps.evaluations == 1 and "4 of 8" in encdiff.explain(unet), "patched before, patched after"


def test_controlnet_and_latent_diffusion():
    control, given = controlnet_of("sd1"), inputs("sd1")
    with encdiff.record_maps(control) as maps, torch.no_grad():
        control(**given, controlnet_cond=torch.rand(2, 3, 32, 32))
    assert len(maps) == 2
    unet = ldm_unet()
    with encdiff.record_maps(unet) as maps, torch.no_grad():
        unet(torch.randn(2, 3, 8, 8), torch.tensor([3, 90]), torch.randn(2, 5, 4))
    assert maps.mean().shape == (2, 5, 8, 8)


@pytest.mark.parametrize("whole", [False, True])
def test_our_own_model(model, whole):
    scalars = torch.randn(2, 3)
    x_t, t = torch.randn(2, *model.latent_shape), torch.tensor([5, 60])
    with torch.no_grad():
        tokens, expected = model.tokens(scalars), []
        output = model.denoise(x_t, t, tokens, maps=expected)
        with encdiff.record_maps(model if whole else model.unet) as maps:
            assert torch.equal(model.denoise(x_t, t, tokens), output)
    assert len(maps) == len(expected) > 2 and maps.evaluations == 1
    assert next(iter(maps)).startswith("input_blocks.")
    for name, one in zip(maps, expected, strict=True):
        torch.testing.assert_close(maps[name], one)


def test_chosen_layers_of_our_own_model(model):
    scalars = torch.randn(2, 3)
    with encdiff.record_maps(model) as maps:
        model.sample(scalars, steps=2)
    with encdiff.record_maps(model, layers="output_blocks") as chosen:
        model.sample(scalars, steps=2)
    assert 0 < len(chosen) < len(maps)
    for name in chosen:
        torch.testing.assert_close(chosen[name], maps[name])


def test_our_own_sampling(model):
    with encdiff.record_maps(model) as maps:
        images = model.sample(torch.randn(2, 3), steps=3)
    assert maps.evaluations == 3 and images.shape[0] == 2
    assert maps.mean(16).shape == (2, 3, 16, 16)
    torch.testing.assert_close(maps.mean(16).sum(1), torch.ones(2, 16, 16))


def test_blocks_may_nest_and_roots_may_differ():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    whole = torch.nn.ModuleDict({"net": unet})
    with torch.no_grad(), encdiff.record_maps(unet) as outer:
        with encdiff.record_maps(unet, layers="mid") as inner:
            unet(**given)
        unet(**given)
    assert (len(outer), outer.evaluations, len(inner), inner.evaluations) == (4, 2, 1, 1)
    encdiff.unpatch(unet)
    encdiff.patch(whole)  # whose layers' names begin with net.
    with torch.no_grad(), encdiff.record_maps(unet) as maps:
        unet(**given)
    assert list(maps) == list(outer)
    encdiff.patch(unet.mid_block)  # some of them once more
    with torch.no_grad(), encdiff.record_maps(unet) as maps:
        unet(**given)
    assert set(maps) == set(outer)


def test_a_compiled_module_is_recorded():
    net, x, prompt = transformer(), torch.randn(2, 16, 4, 4), torch.randn(2, 7, 24)
    encdiff.patch(net)
    with torch.no_grad(), encdiff.record_maps(net) as expected:
        net(x, encoder_hidden_states=prompt, return_dict=False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), encdiff.record_maps(compiled) as maps:
        for _ in range(10):  # more than may be compiled anew
            compiled(x, encoder_hidden_states=prompt, return_dict=False)
    assert maps.evaluations == 10 and len(maps) == len(expected)
    torch.testing.assert_close(maps.mean(), expected.mean())


def test_nobody_elses_tensors_are_written(model):
    x_t, t, tokens = torch.randn(2, *model.latent_shape), torch.tensor([5, 60]), torch.randn(2, 3, 4)
    mine: list[torch.Tensor] = []
    with torch.no_grad(), encdiff.record_maps(model):
        model.denoise(x_t, t, tokens, maps=mine)
        before = [m.clone() for m in mine]
        model.denoise(x_t + 1, t, 2 * tokens)
    assert all(torch.equal(now, then) for now, then in zip(mine, before, strict=True))


def test_inference_mode_and_gradients_mix():
    unet, given = unet_of("sd1"), inputs("sd1")
    with encdiff.record_maps(unet) as maps:
        with torch.inference_mode():
            unet(**given)
        unet(**given)
    assert maps.mean().isfinite().all() and maps.evaluations == 2


def test_what_is_computed_again_for_gradients_is_not_recorded_again():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    unet.enable_gradient_checkpointing()
    unet.train()
    with encdiff.record_maps(unet, steps="each") as maps:
        unet(**given).sample.square().sum().backward()
    assert {len(maps[name]) for name in maps} == {1} and maps.evaluations == 1


def test_a_copy_is_not_recorded():
    unet, given = unet_of("sd1"), inputs("sd1")
    with torch.no_grad(), encdiff.record_maps(unet) as maps:
        copy.deepcopy(unet)(**given)
        assert maps.evaluations == 0
        unet(**given)
    assert maps.evaluations == 1 and "of 1 evaluations" in repr(maps)


def test_memory_is_that_of_the_maps():
    """Twenty evaluations hold as much as one."""
    unet, given = unet_of("sd1"), inputs("sd1")
    with encdiff.record_maps(unet) as maps, torch.no_grad():
        for _ in range(20):
            unet(**given)
    assert sum(len(found) for found in maps._found.values()) == 4


def test_bad_input():
    unet, given = unet_of("sd1"), inputs("sd1")
    message = "layers 'nowhere' name no cross-attention that runs by encdiff.ops: there are"
    with pytest.raises(InputError, match=message), encdiff.record_maps(unet, layers="nowhere"):
        pass
    with (
        pytest.raises(InputError, match="steps is 'all', must be 'mean' or 'each'"),
        encdiff.record_maps(unet, steps="all"),
    ):
        pass
    with (
        pytest.raises(InputError, match="unet is a str, must be a U-Net, or a model or pipeline"),
        encdiff.record_maps("unet"),
    ):
        pass
    with (
        pytest.raises(InputError, match="layers are .3., must be names of layers"),
        encdiff.record_maps(unet, layers=[3]),
    ):
        pass
    with encdiff.record_maps(unet) as maps:
        pass
    with pytest.raises(InputError, match="no evaluation of the U-Net was recorded"):
        maps.mean()
    with pytest.raises(
        InputError, match="layer 'mid' has no map, must be one of: none: no evaluation of the U-Net was recorded"
    ):
        maps["mid"]
    with (
        pytest.raises(InputError, match=r"attends as \(3, 16, 16, 7\) after \(2, 16, 16, 7\): record one size"),
        encdiff.record_maps(unet),
        torch.no_grad(),
    ):
        unet(**given)
        unet(**inputs("sd1", batch=3))
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.rescale_output_factor = 2.0
    with pytest.raises(InputError, match="attn2: it has rescale"), encdiff.record_maps(unet, layers="mid"):
        pass


def test_a_map_agrees_with_a_mask():
    unet, given = unet_of("sd1"), inputs("sd1")
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 4:] = False
    with encdiff.record_maps(unet) as maps, torch.no_grad():
        unet(**given, encoder_attention_mask=mask)
    assert float(maps.mean()[:, 4:].max()) == 0
    assert F.mse_loss(maps.mean()[:, :4].sum(1), torch.ones(2, 16, 16)) < 1e-10
