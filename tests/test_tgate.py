"""T-GATE: its schedule, and on other libraries' U-Nets against evaluations put together by hand."""

import copy

import pytest
import torch
from _unets import controlnet_of, inputs, ldm_unet, relative, transformer, unet_of

import encdiff
from encdiff import TGate
from encdiff.errors import InputError
from encdiff.interop.patch import states_of
from encdiff.ops import record_impls


def modes(gate: TGate, evaluations: int) -> tuple[str, str]:
    """One letter for each evaluation: c, k, r, of cross- and of self-attention."""
    return tuple("".join(of(i)[0] for i in range(1, evaluations + 1)) for of in (gate.cross, gate.own))


def test_schedule():
    assert modes(TGate(10), 15) == ("ccccccccckrrrrr", "cckrrkrrrrccccc")
    assert modes(TGate(1, self_every=1), 4) == ("krrr", "cccc")
    assert modes(TGate(4), 4) == ("ccck", "cckr")
    assert modes(TGate(3, self_warmup=1, self_every=2), 6) == ("cckrrr", "ckkccc")


def steps(unet, given, count=6):
    """Outputs for fresh features at each step; the features do not depend on the outputs."""
    generator, outputs = torch.Generator().manual_seed(0), []
    with torch.no_grad():
        for i in range(count):
            sample = torch.randn(given["sample"].shape, generator=generator)
            outputs.append(unet(**given | {"sample": sample, "timestep": 90 - i}).sample)
    return outputs


def test_before_the_gate_all_is_exact_and_after_it_not():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    exact = steps(unet, given)
    with encdiff.tgate(unet, 4, evaluations=6):
        gated = steps(unet, given)
    errors = [relative(ours, theirs) for ours, theirs in zip(gated, exact, strict=True)]
    assert max(errors[:4]) < 1e-6 and min(errors[4:]) > 1e-4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(steps(unet, given), exact, strict=True)), "as before"


def test_gated_steps_repeat_what_the_gate_gave():
    """Against a U-Net whose attn2 are made to give by hand what they gave at the gate."""
    unet, given = unet_of("sd1"), inputs("sd1")
    kept, handles = {}, []
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    for attn in layers:
        handles.append(attn.register_forward_hook(lambda attn, args, y: kept.setdefault(attn, y)))
    expected = steps(unet, given, 3)[:1]
    expected += [*steps(unet, given, 3)[1:]]
    for handle in handles:
        handle.remove()
    with encdiff.tgate(unet, 1, evaluations=3):
        gated = steps(unet, given, 3)
    for ours, theirs in zip(gated, expected, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_self_attention_is_spared_before_the_gate():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet, self_attention=True)
    ran = []
    with encdiff.tgate(unet, TGate(5, self_warmup=2, self_every=2), evaluations=7), torch.no_grad():
        for i in range(7):
            with record_impls() as calls:
                unet(**given | {"timestep": 90 - i})
            names = [op for op, _ in calls]
            ran.append((names.count("cross_attention"), names.count("self_attention")))
    assert ran == [(4, 4), (4, 4), (4, 4), (4, 0), (4, 4), (0, 4), (0, 4)]


def test_guidance_is_dropped_after_the_gate():
    unet, given = unet_of("sdxl"), inputs("sdxl", batch=4)
    encdiff.patch(unet)
    exact, rows = steps(unet, given), []
    unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with encdiff.tgate(unet, 4, evaluations=6, guided=True):
        gated = steps(unet, given)
    assert rows == [4, 4, 4, 4, 2, 2]
    for i, (ours, theirs) in enumerate(zip(gated, exact, strict=True)):
        assert ours.shape == theirs.shape
        unconditional, conditional = ours.chunk(2)
        assert torch.equal(unconditional, conditional) == (i >= 4), "what guidance adds is zero"


def test_what_is_kept_of_a_guided_batch_is_the_mean_of_its_halves():
    unet, given = unet_of("sd1"), inputs("sd1", batch=4)
    encdiff.patch(unet)
    kept = []
    for guided in (False, True):
        with encdiff.tgate(unet, 2, evaluations=3, guided=guided):
            steps(unet, given, 3)
            kept.append(dict(states_of(unet)[0].kept))
    for name, both in kept[0].items():
        torch.testing.assert_close(kept[1][name], (both[:2] + both[2:]) / 2)


def test_controlnet_is_gated_too():
    unet, control, given = unet_of("sd1"), controlnet_of("sd1"), inputs("sd1", batch=4)
    hint, rows = torch.rand(4, 3, 32, 32), []
    control.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    with encdiff.tgate(unet, 2, 3, guided=True), encdiff.tgate(control, 2, 3, guided=True), torch.no_grad():
        for t in (9, 5, 1):
            at = given | {"timestep": t}
            down, mid = control(**at, controlnet_cond=hint, return_dict=False)
            out = unet(**at, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    assert rows == [4, 4, 4, 4, 2, 2] and out.shape == (4, 4, 16, 16) and len(mid) == 4


def test_latent_diffusion_code():
    unet, x, tokens = ldm_unet(), torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4)
    with torch.no_grad(), encdiff.tgate(unet, 1, evaluations=2):
        with record_impls() as first:
            unet(x, torch.tensor([9, 9]), tokens)
        with record_impls() as second:
            unet(x, torch.tensor([5, 5]), tokens)
    assert len(first) > 2 and second == []


def test_several_samplings_in_one_block():
    unet, given = unet_of("sd1"), inputs("sd1")
    with encdiff.tgate(unet, 2, evaluations=3):
        first, second = steps(unet, given, 3), steps(unet, given, 3)
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_layers_that_stay_with_their_library_are_gated_too():
    unet, given, calls = unet_of("sd1"), inputs("sd1"), []
    for name, module in unet.named_modules():
        if name.endswith("attn2"):
            module.register_forward_hook(lambda *_: calls.append(1))
    with encdiff.tgate(unet, 2, evaluations=4):
        steps(unet, given, 4)
    assert len(calls) == 2 * 4


def test_a_new_prompt_begins_a_new_sampling():
    """Whatever was said of the evaluations: no image of the prompt before."""
    unet, given = unet_of("sd1"), inputs("sd1")
    other = given | {"encoder_hidden_states": torch.randn_like(given["encoder_hidden_states"])}
    with encdiff.tgate(unet, 2, evaluations=3):
        expected = steps(unet, other, 3)
    said = "called 3 times, not 25 as was said"
    with pytest.warns(UserWarning, match=said), encdiff.tgate(unet, 2, evaluations=25):
        steps(unet, given, 3)
        actual = steps(unet, other, 3)
        given["encoder_hidden_states"].copy_(other["encoder_hidden_states"])  # into the same buffer
        again = steps(unet, given, 3)
    for found in (actual, again):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


class LatentDiffusion(torch.nn.Module):
    """What latent-diffusion code wraps its U-Net in."""

    def __init__(self, unet):
        super().__init__()
        self.model = torch.nn.ModuleDict({"diffusion_model": unet})


def test_a_wrapped_unet_is_found_and_one_that_is_not_called_is_said():
    unet = ldm_unet()
    whole, x, t, tokens = LatentDiffusion(unet), torch.randn(2, 3, 8, 8), torch.tensor([9, 9]), torch.randn(2, 5, 4)
    with encdiff.tgate(whole, 1, evaluations=2), torch.no_grad():
        unet(x, t, tokens)
        with record_impls() as ran:
            unet(x, t, tokens)
    assert ran == []
    said = "tgate: the UNet was not called inside the block"
    with pytest.warns(UserWarning, match=said), encdiff.tgate(whole, 1, evaluations=2):
        pass


def test_a_sampling_that_fails_is_followed_by_a_whole_one():
    unet, given = unet_of("sd1"), inputs("sd1")
    with encdiff.tgate(unet, 2, evaluations=4):
        expected = steps(unet, given, 4)
        with pytest.raises(RuntimeError):
            unet(**given | {"sample": torch.randn(2, 5, 16, 16)})
        actual = steps(unet, given, 4)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(actual, expected, strict=True))


def test_a_copy_is_not_gated():
    unet, given = unet_of("sd1"), inputs("sd1")
    encdiff.patch(unet)
    exact = steps(unet, given, 4)
    with encdiff.tgate(unet, 1, evaluations=4):
        steps(unet, given, 2)
        copied = copy.deepcopy(unet)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(steps(copied, given, 4), exact, strict=True))
        steps(unet, given, 2)


def test_a_compiled_module_is_gated():
    net, prompt, features = transformer(), torch.randn(2, 7, 24), torch.randn(6, 2, 16, 4, 4)
    encdiff.patch(net)

    def run(called):
        with torch.no_grad(), encdiff.tgate(called, 2, evaluations=6):
            return [called(x, encoder_hidden_states=prompt, return_dict=False)[0] for x in features]

    expected, exact = run(net), [net(x, encoder_hidden_states=prompt, return_dict=False)[0] for x in features]
    for ours, theirs in zip(run(torch.compile(net, fullgraph=True, backend="aot_eager")), expected, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(expected[-1], exact[-1]) > 1e-3


def test_one_at_a_time():
    unet, given = unet_of("sd1"), inputs("sd1")
    with encdiff.tgate(unet, 1, 2), encdiff.record_maps(unet):
        for refused in (lambda: encdiff.patch(unet), lambda: encdiff.unpatch(unet)):
            with pytest.raises(InputError, match="unet is in use by a block of tgate, must be patched or unpatched"):
                refused()
        message = "unet is in use by a block of tgate, must have one at a time"
        with pytest.raises(InputError, match=message), encdiff.tgate(unet, 1, 2):
            pass
        unet(**given)
        unet(**given)
    assert not states_of(unet)


def test_bad_input(model):
    unet, given = unet_of("sd1"), inputs("sd1", batch=3)

    def refused(message, *args, run=False, **options):
        with pytest.raises(InputError, match=message), encdiff.tgate(unet, *args, **options), torch.no_grad():
            assert run
            unet(**given)
            unet(**given | {"sample": torch.randn(3, 4, 8, 8)})

    refused("gate is 9, must lie in 1 to 5, the evaluations of the U-Net", 9, 5)
    refused("gate is 0, must be an integer at least 1", 0, 5)
    refused("gate is None, must be a whole number or a TGate", None, 5)
    refused("evaluations is 2.5, must be a whole number of at least 1", 2, 2.5)
    refused("sample has 3 rows, must be even", 1, 2, guided=True, run=True)
    refused("batch, size and layers must stay the same during a sampling", 1, 2, run=True)
    refused("evaluations is None, must be given for a U-Net; a pipeline knows them", 1)
    assert not states_of(unet) and not unet._forward_hooks and not unet._forward_pre_hooks
    with pytest.raises(InputError, match="an EncDiff samples with gate="), encdiff.tgate(model, 1, 2):
        pass
    with pytest.raises(InputError, match="must have cross-attention"), encdiff.tgate(torch.nn.Linear(2, 2), 1, 2):
        pass


def test_our_own_model_spares_self_attention_as_the_schedule_says(model):
    scalars, ran = torch.randn(2, 3), []
    unet = model.unet.register_forward_pre_hook(lambda module, args: ran.append(0))
    with record_impls() as calls:
        model.sample(scalars, steps=7, gate=TGate(5, self_warmup=2, self_every=2))
    unet.remove()
    names = [op for op, _ in calls]
    blocks = len(model.unet.attending)
    assert len(ran) == 7 and names.count("self_attention") == 6 * blocks, "one evaluation repeats"
    assert names.count("cross_attention") + names.count("cross_attention_folded") == 5 * blocks


def test_our_own_model_is_exact_up_to_the_gate(model):
    scalars = torch.randn(2, 3)
    exact = model.sample(scalars, steps=6)
    last, spared = (model.sample(scalars, steps=6, gate=gate) for gate in (TGate(6, self_every=1), TGate(6)))
    assert relative(last, exact) < 1e-4 < relative(spared, exact)
    alike = (model.sample(scalars, steps=6, gate=gate) for gate in (3, TGate(3, self_every=1)))
    assert torch.equal(*alike)
