import json
import signal

import numpy as np
import pytest
import torch
from _tiny import TINY

from encdiff import InputError
from encdiff.data import Dataset, describe
from encdiff.errors import Stopped
from encdiff.experiments import reproduce as module
from encdiff.experiments.phases import continuable, mean_and_range, once, score_attributes, scores
from encdiff.experiments.reproduce import PUBLISHED, format_results, reproduce
from encdiff.files.checkpoint import load_tensors
from encdiff.training import train


def made_up(model, dataset, *, protocol, baseline) -> dict:
    """In the form of `evaluate_model`, in place of scores that take long."""
    dci = {"disentanglement": 0.25, "completeness": 0.5, "informativeness_test": 0.6, "importance": [[0.2] * 6] * 20}
    settings = {"name": protocol, "seed": 0, "code": "scalars"}
    scored = {"factor_vae": {"eval_accuracy": 0.7}, "dci": dci, "protocol": settings, "data": describe(dataset)}
    return {"trained": scored}


@pytest.fixture
def small(monkeypatch):
    """`--quick` smaller still, and scores that are made up."""
    monkeypatch.setattr(module, "QUICK_MODEL", module.QUICK_MODEL | dict(image_size=32, vq_multipliers=(1, 1, 1)))
    monkeypatch.setattr(module, "QUICK_RECIPE", dict(steps=3, batch_size=2, warmup=1, checkpoint_every=2))
    monkeypatch.setattr("encdiff.experiments.phases.evaluate_model", made_up)
    monkeypatch.setattr("encdiff.training.step.Training.picture", lambda *_: None)  # most of the time of so short a run


def test_the_whole_way_once(small, tmp_path, monkeypatch):
    said, out = [], tmp_path / "out"
    results = reproduce("mpi3d", out, quick=True, seeds=2, say=said.append)
    assert json.loads((out / "results.json").read_text()) == results
    assert [(run["seed"], run["steps"], run["batch_size"]) for run in results["runs"]] == [(0, 3, 2), (1, 3, 2)]
    assert (
        results["stand_in"] and results["data"]["name"] == "procedural" and results["published"] == PUBLISHED["mpi3d"]
    )
    assert "No data file was given: this procedural room stands in for mpi3d" in said[0] and "say nothing" in said[0]

    table = (out / "results.md").read_text()
    assert said[0] in table
    assert "| seed 1, 3 steps of 2 | 0.700 | 0.250 |" in table
    assert "| **mean of 2 seeds (range)** | 0.700 (0.700 to 0.700) | 0.250 (0.250 to 0.250) |" in table
    assert "| published: EncDiff, its paper (2402.09712) | 0.872 | 0.685 |" in table

    first, other = (load_tensors(out / f"seed{seed}" / "model" / "model.safetensors")[0] for seed in (0, 1))
    stage = load_tensors(out / "first-stage" / "model" / "model.safetensors")[0]
    assert all(torch.equal(first[f"first_stage_model.{name}"], tensor) for name, tensor in stage.items())
    assert not torch.equal(first["cond_stage_model.encoder.0.weight"], other["cond_stage_model.encoder.0.weight"])

    monkeypatch.setattr(module, "train_autoencoder", None)  # a phase that is done is not begun again
    monkeypatch.setattr("encdiff.experiments.phases.train", None)
    monkeypatch.setattr("encdiff.experiments.phases.evaluate_model", None)
    assert reproduce("mpi3d", out, quick=True, seeds=2, say=str) == results
    with pytest.raises(InputError, match="seed0: was begun with batch_size 2, cannot be resumed with 4"):
        reproduce("mpi3d", out, quick=True, seeds=2, batch_size=4, say=str)
    with pytest.raises(InputError, match="first-stage: was begun with images 64, cannot be resumed with 128"):
        reproduce("mpi3d", out, quick=True, data="procedural:4,2,2,2,2,2", say=str)


def test_what_was_interrupted_goes_on(small, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        train(*args, **options, on_step=lambda training: training.step == 1 and signal.raise_signal(signal.SIGINT))

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="kept, the same command continues"):
        patch.setattr("encdiff.experiments.phases.train", interrupted)
        reproduce("cars3d", out, quick=True, seeds=1, say=str)
    assert load_tensors(out / "seed0" / "checkpoint.safetensors")[1]["step"] == "1"
    monkeypatch.setattr(module, "train_autoencoder", None)
    results = reproduce("cars3d", out, quick=True, seeds=1, say=str)
    assert results["runs"][0]["steps"] == 3
    again = reproduce("cars3d", tmp_path / "b", quick=True, seeds=1, first_stage=out / "first-stage", say=str)
    assert not (tmp_path / "b" / "first-stage").exists() and again["runs"][0]["scores"] == results["runs"][0]["scores"]


class Config:
    """Stands for no configuration."""


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    told = []
    once(tmp_path / "run", {}, Config(), None, lambda **mode: told.append(mode))
    assert told == [{"resume": False, "overwrite": True}]


def test_ctrl_c_while_scoring_is_a_stop_too():
    with pytest.raises(Stopped, match="the same command continues"), continuable():
        raise KeyboardInterrupt


class Faces(Dataset):
    """Images of one colour, whose red is the attribute `red`, and whose green says nothing of `smiling`."""

    name, image_size, is_grid = "faces", 4, False
    factor_names, factor_sizes = ("red", "smiling"), (2, 2)
    values = np.random.default_rng(0).integers(2, size=(300, 2))

    def __len__(self):
        return len(self.values)

    def factors(self, indices):
        return self.values[indices]

    def images(self, indices):
        colours = np.random.default_rng(1).integers(100, size=(len(self), 3))
        colours[:, 0] = 100 + 100 * self.values[:, 0]
        return colours[indices][:, None, None].repeat(4, 1).repeat(4, 2).astype(np.uint8)


class Colours(torch.nn.Linear):
    """In place of a model: codes are the mean of each channel, and what it samples is 10 levels too bright."""

    config, latent_shape, inverts_by = TINY, (1, 2, 2), "ddim"

    def encode(self, images):
        return images.mean((2, 3)).detach()

    def reconstruct(self, images, *, sample_ids, **options):
        assert options == dict(sampler="ddim", steps=200, eta=1.0) and len(sample_ids) == len(images)
        assert len(set(sample_ids.tolist())) == len(images)  # a noise of its own for every image
        return images + 10 / 127.5


def test_tad_of_attributes_and_fid(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    result = score_attributes(Colours(1, 1), Faces())
    area = np.array(result["tad"]["auroc"])
    assert result["tad"]["captured"] == ["red"] and area[0, 0] == 1 and area[1:, 0].max() < 0.75
    found = scores(result)
    assert found["TAD"] == pytest.approx(1 - area[1:, 0].max()) and "FID weights: no file" in found["FID"]

    class Folder(Faces):
        factor_names, factor_sizes = (), ()

    assert scores(score_attributes(Colours(1, 1), Folder()))["TAD"] == "faces has no attributes"

    monkeypatch.setattr(
        "encdiff.experiments.phases.inception_features", lambda device: lambda x: x.mean((1, 2), dtype=np.float64)
    )
    fid = score_attributes(Colours(1, 1), Faces())["fid"]
    assert fid["fid"] == pytest.approx(3 * 10**2) and fid["images"] == 300  # the means differ, the covariances do not


def test_the_table_of_faces_names_what_is_undefined():
    about = {"name": "celeba", "data": describe(Faces()), "stand_in": False, "quick": False}
    run = {"steps": 5, "batch_size": 2, "scores": {"TAD": 0.125, "FID": "needs weights"}}
    results = about | {"runs": [run | {"seed": 0}, run | {"seed": 1}], "published": PUBLISHED["celeba"]}
    table = format_results(results)
    assert "| seed 0, 5 steps of 2 | 0.125 | undefined |" in table and "FID is undefined: needs weights." in table
    assert "| **mean of 2 seeds (range)** | 0.125 (0.125 to 0.125) | undefined |" in table
    assert "| published: EncDiff, its paper (2402.09712) | 0.638 | 14.8 |" in table and "stands in" not in table
    grid = results | {"runs": [run | {"seed": 0, "scores": {"FactorVAE score": 0.5, "DCI disentanglement": 0.1}}]}
    assert "| seed 0, 5 steps of 2 | undefined | undefined | 0.500 | 0.100 |" in format_results(grid)
    assert "TAD is undefined: needs data like celeba's." in format_results(grid)


def test_mean_and_range():
    assert mean_and_range([0.5]) == "0.500" and mean_and_range([0.5, "no"]) == "undefined"
    assert mean_and_range([0.1, 0.4, 0.1]) == "0.200 (0.100 to 0.400)"


def test_commands(encdiff, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = encdiff("reproduce", "shapes3d", "--quick", "--first-stage-steps", 1)
    assert code == 0 and "scores: runs/reproduce-shapes3d-quick/results.json" in text
    assert "stands in for shapes3d" in text and "seed 0, 3 steps of 2" in text and "0.969" in text
    assert load_tensors("runs/reproduce-shapes3d-quick/first-stage/checkpoint.safetensors")[1]["step"] == "1"
    options = ["--data", "procedural:2,2,2,2,2,2", "--steps", 1, "--batch-size", 4, "--only", "shared"]
    code, text = encdiff("ablate", *options)
    assert code == 0 and "bank_shared True" in text and "1/1 shared, seed 0: runs/ablations/shared-seed0" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["reproduce", "dsprites"], "dsprites"),
        (["reproduce", "shapes3d", "--data", "nowhere.h5"], "nowhere.h5"),
        (["reproduce", "shapes3d", "--quick", "--precision", "fp8"], "precision is 'fp8', must be"),
        (["reproduce", "shapes3d", "--quick", "--first-stage", "nowhere"], "nowhere"),
        (["ablate", "--only", "vectors,scalars"], "ablation 'scalars' is unknown"),
        (
            ["ablate", "--preset", "shapes3d", "--only", "shared"],
            "first_stage (--first-stage) is None: this preset needs one",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(encdiff, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, text = encdiff(*args)
    assert code == 2 and message in text and "Traceback" not in text
    assert not any(tmp_path.iterdir())


def test_an_unknown_name_and_no_seeds_are_refused(tmp_path):
    with pytest.raises(InputError, match="'dsprites' has no published figures, must be one of shapes3d, mpi3d"):
        reproduce("dsprites", tmp_path)
    with pytest.raises(InputError, match="seeds is 0, must be at least 1"):
        reproduce("shapes3d", tmp_path, seeds=0)
