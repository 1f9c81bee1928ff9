from dataclasses import replace
from functools import partial

import pytest
import torch
from _tiny import TINY
from test_train import CONFIG, rows, stop_after

from encdiff import EncDiff, InputError, ops
from encdiff.data import open_dataset, to_uint8
from encdiff.errors import Stopped
from encdiff.files.checkpoint import load_tensors
from encdiff.ops._beside import give
from encdiff.training import Training, train

pytestmark = pytest.mark.usefixtures("quick_pictures")
BF16 = replace(CONFIG, precision="bf16", steps=100)
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
ENCODER_NORMS = "cond_stage_model.encoder.1."


def training(masters=True, config=BF16, shape=TINY, **changes) -> Training:
    torch.manual_seed(0)
    return Training(EncDiff(shape).to(DEVICE), replace(config, **changes), masters)


def advance(of: Training, steps: int) -> list[float]:
    """The losses of so many steps on images that belong to the step."""
    losses = []
    for _ in range(steps):
        generator = torch.Generator().manual_seed(of.step % 4)
        images = torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8, generator=generator, device="cpu")
        terms = of.advance(images.to(DEVICE), torch.arange(8, device=DEVICE))
        losses.append(terms["loss"].item())
    return losses


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_losses_follow_those_in_float32():
    masters, exact = training(), training(False, precision="float32")
    ours, theirs = advance(masters, 20), advance(exact, 20)
    assert ours == pytest.approx(theirs, rel=2**-8) and ours[-1] < 0.99 * ours[0]
    assert next(masters.computing.unet.parameters()).dtype == torch.bfloat16
    assert ours != theirs


def gradients(ours):
    """Of every parameter what the last step read, in the model's order."""
    found = {i: g for s, indices in ours.masters.segments for i, g in zip(indices, s.gradients, strict=True)}
    return [found[i].float() for i in range(len(found))]


def test_a_step_is_adamws_on_the_same_gradients():
    """Of the gradients that reach the flat buffers, by torch's AdamW and average."""
    ours = training(warmup=1, weight_decay=0.1)
    models = [torch.nn.Parameter(p.detach().clone()) for p in ours.parameters]
    optimizer = torch.optim.AdamW(models, 1.0, BF16.betas, weight_decay=0.1)
    average = {name: a.clone() for name, a in ours.ema.named_parameters()}
    for n in (1, 2, 3):
        advance(ours, 1)
        for p, g in zip(models, gradients(ours), strict=True):
            p.grad = g
        optimizer.param_groups[0]["lr"] = BF16.learning_rate
        optimizer.step()
        decay = (1 + n) / (10 + n)
        for name, p in ours.model.unet.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * p.detach()
    for p, mine in zip(models, ours.parameters, strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-5, atol=1e-6)
    averaged = ours.averaged_model()
    for name, a in average.items():
        torch.testing.assert_close(ours.ema.get_parameter(name), a)
        assert torch.equal(averaged.unet.get_parameter(name), ours.ema.get_parameter(name))
    assert torch.equal(averaged.encoder[0].weight, ours.model.encoder[0].weight)
    assert averaged.encoder[0].weight.untyped_storage().nbytes() == averaged.encoder[0].weight.nbytes


def test_gradients_written_by_the_backward_pass_are_those_that_autograd_gathers(monkeypatch):
    """Of linear layers and convolutions, with biases and without; the same bits on a CPU."""
    written, ours = [], training(gradient_clip=1.0)
    join = ours.masters.beside.join
    monkeypatch.setattr(ours.masters.beside, "join", lambda: (written.append(set(ours.masters.beside.written)), join()))
    advance(ours, 2)
    places = {g.data_ptr() for s, _ in ours.masters.segments for g in s.gradients}
    most = max(written, key=len)
    assert most <= places and len(most) > len(places) / 3
    usual = training(gradient_clip=1.0)
    for p in usual.masters.computing:
        give(p, None)
    advance(usual, 2)
    assert not usual.masters.beside.written
    for mine, theirs in zip(gradients(ours), gradients(usual), strict=True):
        if DEVICE == "cpu":
            assert torch.equal(mine, theirs)
        else:
            torch.testing.assert_close(mine, theirs, rtol=2**-6, atol=2**-8 * theirs.abs().max().item())


def test_the_copy_is_the_masters_rounded_and_shares_what_is_exact():
    ours = training()
    advance(ours, 2)
    (packed, _), (exact, norms) = ours.masters.segments
    assert packed.copy.dtype == torch.bfloat16 and exact.copy is None and len(norms) > 2
    pairs = list(zip(ours.model.named_parameters(), ours.computing.named_parameters(), strict=True))
    for (name, p), (same, rounded) in pairs:
        assert name == same and p.dtype == torch.float32
        assert rounded is p if name.startswith(ENCODER_NORMS) else torch.equal(rounded, p.to(rounded.dtype)), name
        assert p.grad is None and rounded.storage_offset() % 64 == 0
    assert all(a is b for a, b in zip(ours.model.buffers(), ours.computing.buffers(), strict=True))
    assert ours.model.encoder[1].num_batches_tracked == 2
    conv = ours.computing.encoder[0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last) and not conv.is_contiguous()


def test_a_learnt_first_stage_is_shared_and_exact():
    shape = replace(TINY, first_stage="vq", vq_width=32, vq_multipliers=(1, 1), vq_codes=8, image_size=16, groups=8)
    ours = training(shape=shape)
    assert ours.computing.first_stage is ours.model.first_stage
    images = torch.rand(2, 3, 16, 16, device=DEVICE) * 2 - 1
    ours.begin(to_uint8(images))
    with torch.no_grad():
        assert ours.model.to_latents(images).std().item() == pytest.approx(1, rel=1e-4)
    before = [p.clone() for p in ours.model.first_stage.parameters()]
    assert all(loss < 2 for loss in advance(ours, 2))
    after = list(ours.model.first_stage.parameters())
    assert all(p.dtype == torch.float32 and torch.equal(p, b) for p, b in zip(after, before, strict=True))


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_clipped(clip, monkeypatch):
    scales, adamw = [], ops.adamw
    monkeypatch.setattr(ops, "adamw", lambda *a, **k: (scales.append(k["scale"]), adamw(*a, **k)))
    ours = training(gradient_clip=clip)
    norm = ours.masters.step(0.0)
    assert norm == 0 and scales[-1] is None
    ours = training(gradient_clip=clip)
    advance(ours, 1)
    norm = torch.cat([s.gradient.float() for s, _ in ours.masters.segments]).norm().item()
    assert scales[-1].item() == pytest.approx(min(1.0, clip / norm), rel=1e-3)
    assert all(scale is scales[-1] for scale in scales[-2:])


def test_a_parameter_without_a_gradient_counts_as_zero():
    ours = training(weight_decay=0.0)
    still = ours.computing.bank.biases[-1]
    before = ours.model.bank.biases[-1].clone()
    advance(ours, 3)  # at first the concepts have no effect
    assert not torch.equal(ours.model.bank.biases[-1], before)
    (segment, indices), at = ours.masters.segments[0], [p is still for p in ours.masters.computing].index(True)
    for p in ours.masters.computing:
        p.grad = None if p is still else torch.ones_like(p)
    ours.masters.prepare(1e-3, 0.1)
    ours.masters.collect()
    ours.masters.step()
    gradients = dict(zip(indices, segment.gradients, strict=True))
    assert (gradients.pop(at) == 0).all() and all((g == 1).all() for g in gradients.values())


def test_frozen_parameters_stay_and_are_rounded_too():
    torch.manual_seed(0)
    model = EncDiff(TINY).to(DEVICE)
    model.unet.time_embed.requires_grad_(False)
    ours = Training(model, BF16, masters=True)
    before = model.unet.time_embed[0].weight.clone()
    advance(ours, 2)
    assert torch.equal(model.unet.time_embed[0].weight, before)
    assert torch.equal(ours.computing.unet.time_embed[0].weight, before.bfloat16())
    assert torch.equal(ours.ema.time_embed[0].weight, before)


@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(tmp_path, stop, monkeypatch):
    monkeypatch.setattr("encdiff.training.step.Training", partial(Training, masters=True))
    data, config = open_dataset("procedural:2,2,2,2,2,2", TINY.image_size), replace(BF16, steps=6)
    torch.manual_seed(0)
    train(EncDiff(TINY).cpu(), data, tmp_path / "whole", config)  # a GPU's libraries may sum in another order
    torch.manual_seed(0)
    with pytest.raises(Stopped):
        train(EncDiff(TINY).cpu(), data, tmp_path / "broken", config, on_step=stop_after(stop))
    train(EncDiff(TINY).cpu(), data, tmp_path / "broken", config, resume=True)  # other weights at first
    whole, broken = (load_tensors(tmp_path / name / "checkpoint.safetensors")[0] for name in ("whole", "broken"))
    assert equal(whole, broken) and any(k.startswith("optimizer.") for k in whole)
    strip = [[(r["step"], r["loss"], r["gradient_norm"]) for r in rows(tmp_path / n)] for n in ("whole", "broken")]
    assert strip[0] == strip[1]
    assert EncDiff.from_pretrained(tmp_path / "whole" / "model").config == TINY


@pytest.mark.parametrize("first, second", [(True, False), (False, True)])
def test_a_run_of_one_kind_continues_as_the_other(first, second, tmp_path):
    begun, other = training(first), training(second)
    assert begun.tensors().keys() == other.tensors().keys()  # of no step yet
    advance(begun, 3)
    state = {name: t.clone() for name, t in begun.tensors().items()}
    other.load(state, {"scaling_factor": "1.0"}, tmp_path)
    other.step = begun.step
    assert equal(other.tensors(), state)
    assert advance(other, 3) == pytest.approx(advance(begun, 3), rel=2**-9)
    assert all(t.item() == 6 for name, t in other.tensors().items() if name.endswith(".step"))


def test_a_state_at_several_steps_is_refused(tmp_path):
    ours = training()
    advance(ours, 1)
    state = ours.tensors() | {"optimizer.3.step": torch.tensor(7.0)}
    with pytest.raises(InputError, match="its parameters are at steps 1 to 7, must be at one"):
        ours.load(state, {"scaling_factor": "1.0"}, tmp_path)
    with pytest.raises(InputError, match="fits no parameter"):
        ours.load(state | {"optimizer.0.exp_avg": torch.zeros(2)}, {"scaling_factor": "1.0"}, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: setattr(model.unet.out[2], "bias", torch.nn.Parameter(model.unet.out[2].bias.clone())),
        lambda model: model.encoder.__setitem__(0, torch.nn.Conv2d(3, 8, 4, stride=2, padding=1)),
        lambda model: setattr(model.encoder[1], "running_mean", torch.zeros(8)),
        lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
    ],
    ids=["moved", "another parameter", "another module", "another buffer", "assigned"],
)
def test_a_model_that_was_taken_apart_is_refused(change):
    ours = training()
    advance(ours, 1)
    ours.model.to(memory_format=torch.channels_last)  # changes nothing
    advance(ours, 1)
    change(ours.model)
    with pytest.raises(RuntimeError, match="a part of the model was moved or replaced after Training"):
        advance(ours, 1)


def test_a_moved_average_or_a_parameter_frozen_later_is_refused():
    ours = training()
    advance(ours, 1)
    ours.ema.double()
    with pytest.raises(RuntimeError, match="a part of the model was moved or replaced after Training"):
        advance(ours, 1)
    ours = training()
    ours.model.unet.out.requires_grad_(False)
    with pytest.raises(RuntimeError, match="a parameter was frozen after Training"):
        advance(ours, 1)


def test_a_model_of_which_nothing_learns_is_refused():
    with pytest.raises(InputError, match="no parameter that learns"):
        Training(EncDiff(TINY).requires_grad_(False).to(DEVICE), BF16, masters=True)


def test_values_written_in_place_reach_the_copy():
    ours = training()
    with torch.no_grad():
        ours.model.bank.weights[0].fill_(1.5)
    ours.masters.refresh()
    assert (ours.computing.bank.weights[0] == 1.5).all()


def test_checkpointed_activations_reach_the_copy():
    ours = training(checkpoint_activations=True)
    assert ours.computing.unet.checkpoint_activations
    assert advance(ours, 3) == pytest.approx(advance(training(), 3), rel=1e-6)


def test_compiled_steps_agree(monkeypatch):
    shape = replace(TINY, attention_levels=())  # but for the middle: test_engine.py traces attention in a level
    eager = advance(training(shape=shape), 5)
    # traced and differentiated as for Inductor, whose C++ compiler would take minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    assert advance(training(shape=shape, engine="compile"), 5) == pytest.approx(eager, rel=2**-9)


def test_who_uses_them():
    assert (training(None).masters is not None) == GPU and training(None, precision="float32").masters is None
    assert training(False).masters is None
    with pytest.raises(InputError, match="masters is True, needs precision 'bf16', but it is 'float32'"):
        training(True, precision="float32")
    with pytest.raises(InputError, match="a parameter of the model is torch.float64, must be float32"):
        Training(EncDiff(TINY).double(), BF16, masters=True)


@pytest.mark.skipif(not GPU, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_graph_equals_eager_steps_to_the_bit(clip, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    graph, eager = (training(engine=engine, gradient_clip=clip) for engine in ("graph", "eager"))
    assert advance(graph, 20) == advance(eager, 20)
    assert equal(graph.tensors(), eager.tensors())
