"""The menu of `EncDiff.sample`; each sampler's own tests are in test_samplers.py and test_solvers.py."""

import copy
from dataclasses import replace

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff, InputError
from encdiff.models import attention, sample
from encdiff.models.attention import TransformerBlock
from encdiff.models.sample import SAMPLERS
from encdiff.ops._beside import joined


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = EncDiff(replace(TINY, prediction="x0"))  # samples stay within what the network says
    for p in model.unet.parameters():
        if not p.any():  # at the start the network says nothing: its last layers are zero
            torch.nn.init.normal_(p, std=0.05)
    return model.eval()


@pytest.fixture
def scalars():
    return torch.randn(3, TINY.concepts)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sample_is_the_same_in_any_batch_and_its_seed_matters(model, scalars, sampler):
    options = {"sampler": sampler, "steps": 4}
    whole = model.sample(scalars, **options, seed=1)
    parts = torch.cat([model.sample(part, **options, seed=1) for part in scalars.split(2)])
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-5)
    assert (whole - model.sample(scalars, **options, seed=2)).abs().max() > 1e-3
    assert whole.shape == (3, 3, 16, 16) and whole.abs().max() <= 1


def test_every_sampler_is_another(model, scalars):
    images = [model.sample(scalars, sampler=sampler, steps=4) for sampler in SAMPLERS]
    for i, one in enumerate(images):
        assert all((one - other).abs().max() > 1e-4 for other in images[:i]), SAMPLERS[i]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_every_sampler_takes_every_number_of_steps(sampler, T):
    model = EncDiff(replace(TINY, num_timesteps=T)).eval()
    for steps in range(1, T + 1):
        sampled = model.sample(torch.zeros(1, TINY.concepts), sampler=sampler, steps=steps)
        assert sampled.isfinite().all() and model.invert(sampled, steps).isfinite().all()
        assert model.attention_maps(sampled, steps).isfinite().all()
    with pytest.raises(InputError, match=f"steps is {T + 1}, must be a whole number from 1 to {T}"):
        model.sample(torch.zeros(1, TINY.concepts), sampler=sampler, steps=T + 1)


def calls(model, scalars, **options):
    """How often each cross-attention ran, and the images."""
    count, original = 0, TransformerBlock._cross_attend

    def counted(block, *args, **kwargs):
        nonlocal count
        count += 1
        return original(block, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TransformerBlock, "_cross_attend", counted)
        images = model.sample(scalars, steps=6, **options)
    return count / sum(isinstance(m, TransformerBlock) for m in model.unet.modules()), images


def test_the_gate_stops_cross_attention(model, scalars):
    count, exact = calls(model, scalars)
    assert count == 6
    for gate, differs in ((1, True), (4, True), (6, False)):
        count, gated = calls(model, scalars, gate=gate)
        assert count == gate
        assert ((gated - exact).abs().max() > 1e-4) == differs
    torch.testing.assert_close(model.sample(scalars, steps=6), exact, rtol=0, atol=0)


def test_progress_counts_the_evaluations(model, scalars):
    seen = []
    model.sample(scalars, sampler="heun", steps=3, progress=lambda *state: seen.append(state))
    assert seen == [(i, 5) for i in range(1, 6)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": "plms"}, "sampler is 'plms', must be one of dpm-solver\\+\\+, unipc, euler, heun, ddim, ddpm"),
        ({"eta": 0.5}, "eta is 0.5, must be 0 for sampler 'dpm-solver\\+\\+'"),
        ({"gate": 0}, "gate is 0, must be an integer at least 1"),
        ({"gate": 8, "sampler": "heun"}, "gate is 8, must lie in 1 to 7"),
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1001}, "steps is 1001"),
    ],
)
def test_bad_options(model, scalars, options, message):
    with pytest.raises(InputError, match=message):
        model.sample(scalars, **({"steps": 4} | options))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_an_evaluation_can_be_spared_changes_no_more_than_a_rounding(model, scalars, sampler, monkeypatch):
    """On a GPU timesteps are projected in one product for all evaluations, and weights of attentions joined once.

    A double-precision network: what this one makes of a rounding in float32 grows from one evaluation to the next.
    """
    model, scalars = copy.deepcopy(model).double(), scalars.double()
    calls, project = [], model.unet.project
    monkeypatch.setattr(model.unet, "project", lambda t, tokens=None: calls.append(len(t)) or project(t, tokens))
    expected = model.sample(scalars, sampler=sampler, steps=5)
    evaluations = len(calls)
    assert set(calls) == {3}
    calls.clear()
    for module in (sample, attention):
        monkeypatch.setattr(module, "projecting_pays", lambda tokens: True)
    spared = model.sample(scalars, sampler=sampler, steps=5)
    assert calls == [evaluations]
    assert (spared - expected).norm() <= 1e-6 * expected.norm()


def test_a_timestep_among_others_is_projected_as_alone(model):
    t = torch.tensor([0, 17, 500, 999])
    together = model.unet.project(t)
    for n in range(len(t)):
        alone = model.unet.project(t[n : n + 1].expand(3))
        for block, others in zip(alone, together, strict=True):
            for rows, other in zip(block, others, strict=True):
                assert (rows - other[n]).norm() <= 1e-6 * rows.norm()


def test_weights_that_were_joined_are_taken_as_they_lie(model, monkeypatch):
    monkeypatch.setattr(attention, "projecting_pays", lambda tokens: True)
    tokens = torch.randn(2, TINY.concepts, TINY.token_width)
    sampling = attention.begin_sampling(tokens, model.unet.attending)
    for block in model.unet.attending:
        weights, joint = block.attn1.weights()[:3], sampling.projections[block.place]
        assert all(map(torch.equal, joint, weights))
        with torch.no_grad():
            assert joined(tokens, *joint).data_ptr() == joint[0].data_ptr()
            assert torch.equal(joined(tokens, *joint), torch.cat(weights))
            assert joined(tokens, *weights).data_ptr() != weights[0].data_ptr()
        assert joined(tokens, *joint).data_ptr() != joint[0].data_ptr()  # a gradient could not go that way
