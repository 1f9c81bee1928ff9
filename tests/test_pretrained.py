"""The models that come with the package do what their stored scores say, without a network."""

import json

import numpy as np
import pytest
import torch

from encdiff import EncDiff, InputError
from encdiff.data import open_dataset, to_float
from encdiff.evaluation import counterfactual
from encdiff.evaluation.protocol import score_rows, settings_of
from encdiff.files.checkpoint import locate
from encdiff.models import EncDiffConfig
from encdiff.models.sample import SAMPLERS
from encdiff.pretrained import FOLDER


@pytest.fixture(scope="module", params=["quickstart", "room32", "room64"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def model(name, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        return EncDiff.from_pretrained(name)


@pytest.fixture(scope="module")
def room(model):
    return open_dataset("procedural:5,5,5,4,4,5", model.config.image_size)


@pytest.fixture(scope="module")
def drawn(room):
    rows = np.random.default_rng(0).choice(len(room), 2_000, replace=False)
    return to_float(room.images(rows)), room.factors(rows)


def test_they_are_small():
    assert sum(p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()) < 30e6


def test_its_configuration_is_the_preset_s(name, model):
    assert model.config == EncDiffConfig.from_preset(name)


def test_its_scores_are_those_stored_with_it(name, model, drawn):
    images, factors = drawn
    with torch.inference_mode():
        codes = torch.cat([model.encode(part) for part in images.split(500)]).numpy()
    few = {"factor_vae_variance": 2_000, "factor_vae_train": 2_000, "factor_vae_eval": 2_000}
    score = score_rows(codes, factors, settings_of("heldout", **few), ("factor_vae",))["factor_vae"]["eval_accuracy"]
    stored = json.loads(locate(name, "metrics.json", {}).read_text())["trained"]
    assert score == pytest.approx(stored["factor_vae"]["eval_accuracy"], abs=0.03)
    assert stored["protocol"]["name"] == "paper" and stored["data"]["images"] == 10_000


def test_its_reconstructions_are_near_the_images_by_every_sampler(name, model, drawn):
    images = drawn[0][: 16 if name == "quickstart" else 4]
    blank = (images - images.mean(0)).abs().mean()
    for sampler in SAMPLERS:
        assert (model.reconstruct(images, sampler=sampler) - images).abs().mean() < 0.15 * blank, sampler


@pytest.mark.parametrize("name", ["room64"], indirect=True)
def test_swapped_factors_arrive_alone(model, room):
    """Scale and shape, which mixed in every model before it, among them."""
    stored = json.loads(locate("room64", "metrics.json", {}).read_text())["trained"]
    found = counterfactual(model, room, importance=stored["dci"]["importance"], pairs=3, steps=10, seed=1)
    assert found["exact"] == found["reconstructed"] == 1.0


def test_a_name_that_is_nothing_is_refused_without_a_network(monkeypatch):
    monkeypatch.setattr("encdiff.files.checkpoint.hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    for name in ("quickstrat", "./model", "/no/such", "runs/seed0/modle"):
        with pytest.raises(
            InputError, match=rf"{name}: no such folder; must be one, .* \(quickstart, room32, room64\)"
        ):
            EncDiff.from_pretrained(name)


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    with pytest.raises(InputError, match="quickstart: no config.json in it"):
        EncDiff.from_pretrained("quickstart")
