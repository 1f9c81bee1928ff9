"""A pipeline of diffusers, from random parts and without downloads, with everything of ours in it."""

import pytest
import torch
from _pipeline import stable_diffusion
from _unets import relative

import encdiff
from encdiff import TGate
from encdiff.errors import InputError
from encdiff.interop import state

diffusers = pytest.importorskip("diffusers", reason="the pipelines are those of diffusers")
STEPS = 6


def prompt(rows: int = 1) -> dict[str, torch.Tensor]:
    drawing = torch.Generator().manual_seed(2)
    return {
        "prompt_embeds": torch.randn(rows, 5, 8, generator=drawing),
        "negative_prompt_embeds": torch.zeros(rows, 5, 8),
    }


def draw(pipe, guidance: float = 7.5, given=None) -> torch.Tensor:
    """Latents, from the same noise each time."""
    return pipe(
        **(given or prompt()), num_inference_steps=STEPS, guidance_scale=guidance, output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@pytest.fixture
def pipe():
    return stable_diffusion(diffusers.DDIMScheduler(steps_offset=1))


@pytest.fixture
def rows(pipe) -> list[int]:
    """How many samples each evaluation of the U-Net computed."""
    seen = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_a_patched_pipeline_draws_the_same(pipe, guidance, monkeypatch):
    expected, made = draw(pipe, guidance), []
    encdiff.patch(pipe.unet, self_attention=True)
    projected = state.Projected
    monkeypatch.setattr(state, "Projected", lambda *given: made.append(1) or projected(*given))
    with encdiff.ops.record_impls() as ran:
        assert relative(draw(pipe, guidance), expected) < 1e-5
    cross = [op for op, _ in ran if op == "cross_attention"]
    assert len(cross) == STEPS * len(made) > 0, "a prompt's keys and values are made once, not at every step"


def test_maps_of_a_sampling(pipe):
    expected = draw(pipe)
    with encdiff.record_maps(pipe.unet) as maps:
        assert relative(draw(pipe), expected) < 1e-5
    assert maps.evaluations == STEPS
    assert maps.mean().shape == (2, 5, 4, 4)  # the empty prompt, then ours
    assert torch.allclose(maps.mean()[0], torch.full((5, 4, 4), 0.2)), "tokens that are all alike share alike"
    assert not torch.allclose(maps.mean()[1], torch.full((5, 4, 4), 0.2), atol=1e-3)


def test_tgate_drops_the_guidance(pipe, rows):
    whole = draw(pipe)
    with encdiff.tgate(pipe, TGate(3)):  # the pipeline knows how often and whether guided
        gated, again = draw(pipe), draw(pipe)
    assert rows == [2] * STEPS + 2 * [2, 2, 2, 1, 1, 1]
    assert torch.equal(gated, again) and gated.shape == whole.shape and relative(gated, whole) > 5e-5


@pytest.mark.parametrize("name, evaluations", [("HeunDiscreteScheduler", 2 * STEPS - 1), ("PNDMScheduler", STEPS + 1)])
def test_evaluations_of_other_schedulers(name, evaluations):
    options = {"skip_prk_steps": True} if name.startswith("PNDM") else {}
    pipe = stable_diffusion(getattr(diffusers, name)(steps_offset=1, **options))
    with encdiff.tgate(pipe, 2), encdiff.record_maps(pipe) as maps:
        first, second = draw(pipe), draw(pipe)
    assert maps.evaluations == 2 * evaluations and torch.equal(first, second)


def test_image_to_image_knows_its_evaluations(recwarn):
    pipe = stable_diffusion(diffusers.DDIMScheduler(steps_offset=1), from_image=True)
    given = prompt() | {"image": torch.rand(1, 3, 16, 16), "strength": 0.5}
    with encdiff.tgate(pipe, 2), encdiff.record_maps(pipe) as maps:
        draw(pipe, given=given)
    assert maps.evaluations == 3 and not [w for w in recwarn if "tgate" in str(w.message)]


def test_guidance_that_is_not_there(pipe):
    message = "guided is True, must be False for a pipeline that samples without guidance"
    with pytest.raises(InputError, match=message), encdiff.tgate(pipe, 2, guided=True):
        draw(pipe, guidance=1.0, given=prompt(2))


def test_tgate_at_the_last_evaluation_is_exact(pipe):
    with encdiff.tgate(pipe.unet, STEPS, evaluations=STEPS):
        gated = draw(pipe)
    assert relative(gated, draw(pipe)) < 1e-5


def test_the_error_falls_with_the_gate(pipe):
    """As near to the whole sampling as evaluations are left out, with the guidance kept."""
    whole, errors = draw(pipe), []
    for gate in (1, 3, 5, 6):
        with encdiff.tgate(pipe.unet, gate, evaluations=STEPS):
            errors.append(relative(draw(pipe), whole))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5 < 1e-3 < errors[0]


def test_all_at_once_with_our_scheduler(pipe, rows):
    pipe.scheduler = encdiff.EncDiffScheduler.from_config(pipe.scheduler.config)
    encdiff.patch(pipe.unet)
    gate = encdiff.tgate(pipe.unet, TGate(3), evaluations=STEPS, guided=True)
    with encdiff.record_maps(pipe.unet) as maps, gate:
        images = draw(pipe, given=prompt(2))
    assert rows == [4, 4, 4, 2, 2, 2] and images.shape == (2, 4, 8, 8) and images.isfinite().all()
    assert maps.mean().shape == (4, 5, 4, 4)


def test_too_few_evaluations_are_said(pipe):
    with pytest.raises(InputError, match="gate is 25, must lie in 1 to 6"), encdiff.tgate(pipe.unet, 25, STEPS):
        pass


def test_a_pipeline_stands_for_its_unet(pipe, rows):
    expected = draw(pipe)
    table = encdiff.patch(pipe)
    assert str(table) == encdiff.explain(pipe) == encdiff.explain(pipe.unet)
    with encdiff.record_maps(pipe) as maps, encdiff.tgate(pipe, STEPS, STEPS):
        assert relative(draw(pipe), expected) < 1e-5
    assert maps.evaluations == STEPS
    encdiff.unpatch(pipe)
    assert torch.equal(draw(pipe), expected)
