"""What the field adds to EncDiff's objective: each against its formula, by other means."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from _tiny import TINY, shaken
from sklearn.mixture import GaussianMixture

from encdiff import EncDiff, InputError, TrainConfig, open_dataset, train
from encdiff.experiments import reproduce as reproducing
from encdiff.experiments.reproduce import reproduce
from encdiff.files.checkpoint import load_tensors
from encdiff.models import core
from encdiff.models.config import OBJECTIVES, PRESETS
from encdiff.objectives.anchors import Anchors
from encdiff.objectives.dropout import SkipDropout, drop_tokens
from encdiff.objectives.keys import Key
from encdiff.objectives.mutual_information import normal_discrepancy
from encdiff.objectives.orthogonality import EVERY, orthogonality
from encdiff.training import RECIPES, step

FLOW = replace(TINY, **OBJECTIVES["flow"])
GUIDED = replace(TINY, **OBJECTIVES["guided"])


def key(count: int, seed: int | None = None) -> Key:
    return Key(int(torch.randint(2**62, ())) if seed is None else seed, torch.arange(count))


# mutual information


def test_the_discrepancy_is_what_drawing_normal_numbers_gives():
    scalars, n = torch.randn(37, 3, dtype=torch.float64) * 1.3 + 0.4, 3
    normal = torch.randn(2, 200_000, n, dtype=torch.float64)

    def kernel(a, b):
        return torch.exp(-(a - b).square().sum(-1) / (2 * n))

    pairs = [kernel(scalars[i], scalars[j]) for i in range(37) for j in range(37) if i != j]
    between = torch.stack([kernel(s, normal[0]).mean() for s in scalars]).mean()
    expected = torch.stack(pairs).mean() - 2 * between + kernel(normal[0], normal[1]).mean()
    assert normal_discrepancy(scalars).item() == pytest.approx(expected.item(), abs=2e-3)


def test_the_discrepancy_is_nothing_of_normal_scalars_and_grows_with_what_is_not():
    found = [normal_discrepancy(torch.randn(64, 7)).item() for _ in range(200)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 200**0.5
    together = torch.randn(64, 1).expand(64, 7)  # each normal, but all the same
    for other in (together, torch.randn(64, 7) * 0.3, torch.randn(64, 7) + 1):
        assert normal_discrepancy(other) > 10 * np.std(found)


# orthogonality


def effects(weights: torch.Tensor, tokens: torch.Tensor):
    """A prediction linear in the tokens (B, N, d) by weights (N, d, size), and how rows of it are predicted."""
    return (
        lambda rows, other: torch.einsum("bnd,nds->bs", other, weights),
        torch.einsum("bnd,nds->bs", tokens, weights),
    )


def test_concepts_that_change_other_places_do_not_overlap_and_those_that_change_the_same_do():
    tokens = torch.randn(23, 5, 2)
    apart, same = torch.zeros(5, 2, 35), torch.randn(1, 1, 35).expand(5, 2, 35)
    for concept in range(5):
        apart[concept, :, 7 * concept : 7 * concept + 7] = torch.randn(2, 7)
    for weights, wanted in ((apart, 0.0), (same, 1.0)):
        predict, predicted = effects(weights, tokens)
        assert orthogonality(predict, predicted, tokens, key(23)).item() == pytest.approx(wanted, abs=1e-4)


def test_the_overlap_is_that_of_two_other_concepts_of_every_such_row():
    tokens, weights = torch.randn(19, 4, 3), torch.randn(4, 3, 11)
    predict, predicted = effects(weights, tokens)
    seen = []

    def watched(rows, other):
        seen.append((rows, other))
        return predict(rows, other)

    found = orthogonality(watched, predicted, tokens, key(19))
    ((rows, other),) = seen
    own = tokens[::EVERY]
    assert torch.equal(rows[: len(own)], torch.arange(0, 19, EVERY)) and len(rows) == 2 * len(own)
    changed = (other.unflatten(0, (2, len(own))) != own).any(-1)  # (2, rows, concepts)
    assert (changed.sum(-1) == 1).all() and not (changed[0] & changed[1]).any()
    cosines = []
    for row in range(len(own)):
        d = [sum((other[half * len(own) + row, n] - own[row, n]) @ weights[n] for n in range(4)) for half in range(2)]
        cosines.append(torch.cosine_similarity(d[0], d[1], dim=0) ** 2)
    assert found.item() == pytest.approx(torch.stack(cosines).mean().item(), rel=1e-4)


# dropout


def test_tokens_are_dropped_by_the_image():
    tokens = torch.randn(4000, 3, 2)
    k = key(4000)
    kept = drop_tokens(tokens, 0.3, k)
    gone = (kept == 0).all(-1).all(-1)
    assert torch.equal(kept[~gone], tokens[~gone]) and abs(gone.float().mean() - 0.3) < 0.04
    assert torch.equal(drop_tokens(tokens[5:9], 0.3, k._replace(sample_ids=k.sample_ids[5:9])), kept[5:9])


def test_skips_keep_their_mean_and_each_place_has_its_own():
    skip, drop = torch.ones(5, 7, 40, 41), SkipDropout(0.2, key(5))
    first, second = drop(skip, 0), drop(skip, 1)
    assert set(first.unique().tolist()) == {0.0, 1.25} and abs(first.mean() - 1) < 0.01
    assert abs(((first == 0) & (second == 0)).float().mean() - 0.04) < 0.005


# anchors


def test_anchors_are_the_mean_under_a_mixture():
    anchors = Anchors(2, 5).eval()
    anchors.share.copy_(torch.rand(2, 5).softmax(-1))
    anchors.first.copy_(anchors.share * torch.randn(2, 5))
    anchors.second.copy_(anchors.share * (anchors.means**2 + 0.3 + torch.rand(2, 5)))
    scalars = torch.randn(31, 2)
    for concept in range(2):
        model = GaussianMixture(5, covariance_type="diag")
        model.weights_ = anchors.share[concept].double().numpy() / anchors.share[concept].double().sum().item()
        model.means_ = anchors.means[concept, :, None].double().numpy()
        model.covariances_ = anchors.variances[concept, :, None].double().numpy()
        model.precisions_cholesky_ = model.covariances_**-0.5
        wanted = model.predict_proba(scalars[:, concept, None].double().numpy()) @ model.means_[:, 0]
        assert np.allclose(anchors(scalars)[:, concept].numpy(), wanted, atol=1e-5)


def test_anchors_follow_the_groups_of_the_scalars():
    anchors, generator = Anchors(1, 4).train(), torch.Generator().manual_seed(3)
    groups = torch.tensor([-1.4, -0.5, 0.6, 1.5])
    for draw in range(800):
        drawn = groups[torch.randint(4, (64, 1), generator=generator)]
        anchors(drawn + 0.05 * torch.randn(64, 1, generator=generator), key(64)._replace(draw=draw))
    assert torch.allclose(anchors.means.sort().values[0], groups, atol=0.06)
    assert (anchors.share - 0.25).abs().max() < 0.08
    snapped = anchors.eval()(torch.tensor([[-1.2], [0.45]]))
    assert (snapped[:, 0] - torch.tensor([-1.4, 0.6])).abs().max() < 0.1  # towards the group, away from where it was


def test_while_training_a_scalar_goes_to_a_component_as_often_as_it_belongs_there():
    anchors = Anchors(1, 3).train()
    anchors.second.mul_(1.2)
    belongs = anchors._logits(torch.tensor([[0.4]])).softmax(-1)[0, 0]
    anchors._follow = lambda *_: None
    middles = anchors.means[0].clone()
    drawn = anchors(torch.full((20_000, 1), 0.4), key(20_000))[:, 0]
    often = torch.bincount((drawn[:, None] - middles).abs().argmin(1), minlength=3) / 20_000
    assert drawn.std() > 0.1 and (often - belongs).abs().max() < 0.1
    scalar = torch.full((5, 1), 0.4, requires_grad=True)
    anchors(scalar, key(5)).sum().backward()
    assert scalar.grad.isfinite().all() and scalar.grad.any()


def test_a_component_that_nothing_comes_near_does_no_harm():
    anchors = Anchors(1, 4).train()
    for draw in range(3000):
        anchors(torch.full((8, 1), 0.6) + 0.01 * torch.randn(8, 1), key(8)._replace(draw=draw))
    assert anchors.means.isfinite().all() and anchors.variances.isfinite().all() and (anchors.share > 0).all()
    assert abs(anchors.eval()(torch.tensor([[0.6]])).item() - 0.6) < 0.05


# the loss


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_that_of_the_noise_and_what_is_added(name, images, monkeypatch):
    config = replace(TINY, **OBJECTIVES[name])
    model, x0 = shaken(config).train(), torch.randn(4, *EncDiff(config).latent_shape)
    images, noise, t = images[:4], torch.randn_like(x0), torch.tensor([0, 3, 500, 999])
    kept = []
    denoise = model.denoise
    monkeypatch.setattr(
        model, "denoise", lambda *given, **by: kept.append((*given, denoise(*given, **by))) or kept[-1][-1]
    )
    model.encoder.eval()  # the same statistics in both calls
    given = {"x0": x0, "noise": noise, "t": t, "seed": 5}
    loss = model.loss(images, **given)
    x_t, _, tokens, predicted = kept[0]
    if config.prediction == "flow":
        s = ((t + 1) / 1000)[:, None, None, None]
        assert torch.allclose(x_t, (1 - s) * x0 + s * noise, atol=1e-6)
        expected = (predicted - (noise - x0)).abs().mean()
    else:
        expected = (predicted - noise).abs().mean()
    scalars = model.encoder(images)
    if config.mutual_information:
        expected = expected + 0.3 * normal_discrepancy(scalars)
    if config.orthogonality:
        predict = lambda rows, other: denoise(x_t[rows], t[rows], other)  # noqa: E731
        expected = expected + config.orthogonality * orthogonality(predict, predicted, tokens, key(4, seed=5))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    if config.anchors:
        assert not torch.allclose(tokens, model.bank(scalars))


def test_what_is_dropped_while_training_is_there_otherwise(images):
    model = shaken(replace(TINY, token_dropout=0.5, skip_dropout=0.5))
    plain = EncDiff(TINY).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.loss(images, seed=3), plain.loss(images, seed=3))
    model.encoder.eval()
    assert not torch.equal(model.train().loss(images, seed=3), plain.train().loss(images, seed=3))


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    room = open_dataset("procedural:2,2,2,2,2,2", image_size=16)
    config = replace(TINY, **{k: v for changes in OBJECTIVES.values() for k, v in changes.items()})  # all of them

    def run_to(steps: int, folder: str, resume: bool = False):
        torch.manual_seed(0)
        recipe = TrainConfig(steps=steps, batch_size=8, warmup=1, picture_every=100)
        train(EncDiff(config), room, tmp_path / folder, recipe, resume=resume)
        return load_tensors(tmp_path / folder / "checkpoint.safetensors")[0]

    whole = run_to(4, "whole")
    run_to(2, "parts")
    parts = run_to(4, "parts", resume=True)
    assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    assert any("anchors.share" in k for k in whole)


# what cannot be


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prediction": "flow", "schedule": "cosine"}, "schedule is 'cosine', has no meaning for prediction 'flow'"),
        ({"prediction": "flow", "beta_end": 0.02}, "beta_end is 0.02, has no meaning for prediction 'flow'"),
        (
            {"anchors": 8, "concept_width": 2, "normalize_scalars": True},
            "anchors is 8, needs concept_width 1: scalars are drawn to them",
        ),
        ({"anchors": 8}, "anchors is 8, needs normalize_scalars: unit variance"),
        ({"flow_output": "x0"}, "flow_output is 'x0', needs prediction 'flow', not 'epsilon'"),
        ({"orthogonality": 0.1, "concepts": 1}, "orthogonality is of two concepts, concepts is 1"),
        ({"token_dropout": 1.0}, "token_dropout is 1.0"),
    ],
)
def test_an_objective_that_a_configuration_cannot_carry_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        replace(TINY, **changes)


@pytest.mark.parametrize("name", ["dyga", "mutual-information", "flow-orthogonal"])
def test_what_is_of_a_whole_batch_is_refused_in_parts(name, monkeypatch):
    model = EncDiff(replace(TINY, **OBJECTIVES[name]))
    with pytest.raises(InputError, match="^accumulate is 2, must be 1: .* is of a whole batch$"):
        step.Training(model, TrainConfig(accumulate=2))
    with pytest.raises(InputError, match="^batch_size is 1, must be at least 2 for "):
        step.Training(model, TrainConfig(batch_size=1))
    monkeypatch.setattr(step, "processes", lambda: SimpleNamespace(size=2))
    with pytest.raises(InputError, match="^processes is 2, must be 1: .* is of a whole batch$"):
        step.Training(model, TrainConfig())


def test_two_images_at_least_exchange_concepts_and_are_compared():
    tokens = torch.randn(1, 3, 2)
    with pytest.raises(InputError, match="^orthogonality is of 2 images at least"):
        orthogonality(*effects(torch.randn(3, 2, 5), tokens), tokens, key(1))
    with pytest.raises(InputError, match="^mutual_information is of the scalars of 2 images at least, not of 1$"):
        normal_discrepancy(torch.randn(1, 3))
    few = torch.randn(3, 4, 2)
    assert orthogonality(*effects(torch.randn(1, 1, 7).expand(4, 2, 7), few), few, key(3)).item() > 0.99


def test_images_without_concepts_are_left_out():
    tokens, weights = torch.randn(40, 4, 3), torch.randn(4, 3, 11)
    gone = tokens.clone()
    gone[8::8] = 0
    own = torch.stack([orthogonality(*effects(weights, tokens[r]), tokens[r], key(2, 9)) for r in ([0, 4], [4, 0])])
    assert own.isfinite().all()
    gone[4::4] = 0  # only the first image of those that count is there: no pair is
    assert orthogonality(*effects(weights, gone), gone, key(40)).item() == 0


def test_the_effect_of_a_concept_is_not_that_of_dropped_skips(images, monkeypatch):
    config = replace(TINY, **OBJECTIVES["flow-orthogonal"], skip_dropout=0.4)
    model, seen = shaken(config).train(), []
    model.encoder.eval()
    denoise = model.denoise
    monkeypatch.setattr(model, "denoise", lambda *given, **by: seen.append(denoise(*given, **by)) or seen[-1])
    monkeypatch.setattr(core, "orthogonality", lambda predict, predicted, tokens, key: (
        (predict(torch.tensor([1, 3, 1]), tokens[[1, 3, 1]]) - predicted[[1, 3, 1]]).abs().mean()
    ))  # fmt: skip
    model.loss(images, seed=3)
    assert len(seen) == 2 and torch.allclose(seen[1], seen[0][[1, 3, 1]], atol=1e-5)


def test_every_objective_is_a_preset_with_a_recipe():
    for name, changes in OBJECTIVES.items():
        assert PRESETS[name] == replace(PRESETS["quickstart"], **changes)
        assert RECIPES[name] == TrainConfig.from_preset("quickstart", objective=name)
        assert PRESETS["shapes3d"].with_objective(name) == replace(PRESETS["shapes3d"], **changes)
    with pytest.raises(InputError, match="^objective 'gan' is unknown, must be one of flow, "):
        PRESETS["quickstart"].with_objective("gan")


def test_reproduce_knows_them(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(reproducing, "train_first_stage_once", lambda *_: None)
    monkeypatch.setattr(reproducing, "train_once", lambda run, config, *_, **__: begun.append(config))
    monkeypatch.setattr(reproducing, "score_once", lambda *_, **__: None)
    monkeypatch.setattr(reproducing, "write_results", lambda out, about, seeds: about)
    about = reproduce("shapes3d", tmp_path, quick=True, seeds=1, objective="flow", say=lambda said: None)
    assert about["objective"] == "flow" and "The objective is flow" in reproducing._notes(about)
    assert [config.prediction for config in begun] == ["flow"] and begun[0].first_stage == "vq"
