"""VAEs as models, files, trainings and commands: exact resume, what a run holds, what is refused."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY
from _vaes import OBJECTIVES, SHORT, SIZES, tiny
from test_train import rows, stop_after

from encdiff import EncDiff, InputError, evaluate
from encdiff.baselines import PRESETS, VAE, VAEConfig, VAETrainConfig, VAETraining, load_concepts, recipes, train_vae
from encdiff.baselines.config import HELD
from encdiff.baselines.network import Decoder
from encdiff.cli import app
from encdiff.data import open_dataset
from encdiff.errors import Stopped
from encdiff.fields import FieldModel
from encdiff.files.checkpoint import load_tensors

DATA = "procedural:2,2,2,2,2,2"


@pytest.fixture(scope="module")
def data():
    return open_dataset(DATA, 16)


@pytest.fixture
def undrawn(monkeypatch):
    """Trainings draw no pictures, which would take most of their time."""
    monkeypatch.setattr(VAETraining, "picture", lambda *_: None)


def fresh(objective="beta", **changes) -> VAE:
    torch.manual_seed(0)
    return VAE(tiny(objective, **changes))


def images(count=5):
    return torch.rand(count, 3, 16, 16) * 2 - 1


# -- the model


def test_the_decoder_is_the_published_one_at_64():
    shapes = [tuple(p.shape) for name, p in Decoder().named_parameters() if name.endswith("weight")]
    assert shapes == [(256, 10), (1024, 256), (64, 64, 4, 4), (64, 32, 4, 4), (32, 32, 4, 4), (32, 3, 4, 4)]


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
def test_images_of_every_size_come_out_as_they_went_in(size):
    model = VAE(tiny(image_size=size))
    x = torch.rand(2, 3, size, size) * 2 - 1
    mean, log_variance = model.posterior(x)
    assert mean.shape == log_variance.shape == (2, 3)
    assert model.reconstruct(x).shape == x.shape and model.reconstruct(x).abs().max() <= 1


def test_what_people_do_with_concepts():
    model, x = fresh().eval(), images()
    codes = model.encode(x)
    assert torch.equal(codes, model.posterior(x)[0])
    swapped = model.swap(x, x.flip(0), [1])
    wanted = codes.flip(0).clone()
    wanted[:, 1] = codes[:, 1]
    torch.testing.assert_close(swapped, model.sample(wanted))
    assert model.traverse(x[0], 2, [-1.0, 0.5]).shape == (2, 3, 16, 16)
    told = []
    first = model.sample(codes, sampler="ddim", steps=3, seed=1, progress=lambda *done: told.append(done))
    assert told == [(1, 1)] and torch.equal(first, model.sample(codes)), "options of a diffusion have no effect"
    for call in (model.invert, model.attention_maps):
        with pytest.raises(InputError, match="a VAE "):
            call(x)
    for bad in (codes[:, :2], codes[0]):
        with pytest.raises(InputError, match=r"^scalars are \(.*\), must be \(B, 3\)$"):
            model.sample(bad)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_comes_back_from_its_folder_to_the_bit(tmp_path, objective):
    model, x = fresh(objective).eval(), images()
    model.save_pretrained(tmp_path)
    again = VAE.from_pretrained(tmp_path)
    assert again.config == model.config and not again.training
    assert torch.equal(again.reconstruct(x), model.reconstruct(x))
    assert isinstance(load_concepts(tmp_path), VAE)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "vae"


def test_no_kind_of_model_is_read_as_another(tmp_path):
    fresh().save_pretrained(tmp_path / "vae")
    EncDiff(TINY).save_pretrained(tmp_path / "encdiff")
    with pytest.raises(
        InputError, match=r"is of a VAE, must be of an EncDiff; `encdiff.baselines.VAE` reads the other$"
    ):
        EncDiff.from_pretrained(tmp_path / "vae")
    with pytest.raises(InputError, match="is of no VAE"):
        VAE.from_pretrained(tmp_path / "encdiff")
    with pytest.raises(InputError, match="is of no model of fields"):
        FieldModel.from_pretrained(tmp_path / "vae")
    assert isinstance(load_concepts(tmp_path / "encdiff"), EncDiff)
    with pytest.raises(InputError, match="no such folder"):
        load_concepts(tmp_path / "none")


# -- configurations


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"objective": "vae"}, "objective is 'vae', must be one of 'beta', 'anneal'"),
        ({"gamma": 3.0}, "gamma is 3.0, but objective 'beta' has none; it takes beta$"),
        (
            {"objective": "factor", "lambda_d": 1.0},
            "lambda_d is 1.0, but objective 'factor' has none; it takes gamma, ",
        ),
        ({"objective": "dip-i", "capacity": 1.0}, "it takes lambda_od, lambda_d$"),
        ({"beta": -1.0}, "beta is -1.0, must be"),
        ({"objective": "anneal", "capacity_rise": 0.0}, "capacity_rise is 0.0, must be"),
        ({"image_size": 48}, r"image_size is 48, must be 4 \* 2\*\*k"),
        ({"concepts": 0}, "concepts is 0, must be"),
        (
            {"objective": "anneal", "capacity": 50.0},
            r"capacity is 50 nats, must be at most 49.91: 3 latents hold 16.6 each",
        ),
    ],
)
def test_a_configuration_that_makes_no_sense(changes, said):
    with pytest.raises(InputError, match=said) as caught:
        VAEConfig(**SIZES | changes)
    assert "\n" not in str(caught.value)


def test_a_latent_that_holds_more_than_its_bound_loses_its_noise():
    """At that width the noise of float32 codes near 1 is rounded away; at a quarter of the capacity it is not."""
    mean, noise = 1 + torch.rand(1000), torch.randn(1000).clamp(-1, 1)
    lost = [(mean + np.exp(-held) * noise == mean).float().mean().item() for held in (HELD, HELD * 1.06, HELD / 2)]
    assert lost[0] > 0.3 and lost[1] > 0.6 and lost[2] < 0.001, lost


@pytest.mark.parametrize("name", ["shard", "checkpoint_activations"])
def test_a_recipe_has_nothing_of_a_unet(name):
    with pytest.raises(InputError, match=f"^{name} is True, must be False: a VAE has no U-Net$"):
        VAETrainConfig(**{name: True})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_of_the_same_images_and_encoder(name):
    config = PRESETS[name]
    assert (config.image_size, config.encoder_width, config.concepts) == (32, 32, 10)
    assert VAEConfig.read(json.loads(json.dumps(config.described())), "config.json") == config
    with pytest.raises(InputError, match=r"^preset 'vae' is unknown, must be one of annealvae, beta-vae"):
        recipes.vae_config("vae")


# -- training


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stop", [3, 4])
def test_a_resumed_run_equals_an_unbroken_one_to_the_bit(data, tmp_path, objective, stop, undrawn):
    train_vae(fresh(objective), data, tmp_path / "whole", SHORT)
    with pytest.raises(Stopped, match=f"stopped after step {stop}; saved"):
        train_vae(fresh(objective), data, tmp_path / "broken", SHORT, on_step=stop_after(stop))
    torch.manual_seed(99)  # nothing may hang on the global generator, nor on what the model was
    train_vae(VAE(tiny(objective)), data, tmp_path / "broken", SHORT, resume=True)
    whole, broken = (load_tensors(tmp_path / run / "checkpoint.safetensors")[0] for run in ("whole", "broken"))
    assert whole.keys() == broken.keys() and all(torch.equal(t, broken[name]) for name, t in whole.items())
    logs = [
        [{k: v for k, v in row.items() if "second" not in k} for row in rows(tmp_path / r)] for r in ("whole", "broken")
    ]
    assert logs[0][-1] == logs[1][-1]


def test_a_run_learns_and_its_log_says_what(data, tmp_path):
    model, run = fresh("anneal", gamma=10.0, capacity=6.0, capacity_rise=0.5), tmp_path / "run"
    trained = train_vae(model, data, run, replace(SHORT, steps=60, batch_size=16, log_every=10))
    log = [{name: float(value) for name, value in row.items()} for row in rows(run)]
    assert log[-1]["reconstruction"] < 0.99 * log[0]["reconstruction"]
    assert [row["capacity"] for row in log] == pytest.approx([6 * min(1, (s - 1) / 30) for s in range(10, 61, 10)])
    for row in log:
        assert row["kl"] == pytest.approx(sum(row[f"kl_{i}"] for i in range(3)), rel=1e-5)
        assert row["loss"] == pytest.approx(row["reconstruction"] + 10 * abs(row["kl"] - row["capacity"]), rel=1e-5)
    assert [p.name for p in (run / "samples").iterdir()] == ["swap-0000060.png"]
    again = VAE.from_pretrained(run / "model")
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in trained.state_dict().items())
    assert torch.equal(again.decoder[0].weight, model.decoder[0].weight), "no average"
    with pytest.raises(InputError, match="steps 60, cannot be resumed with 90: the learning rate depends on it"):
        train_vae(model, data, run, replace(SHORT, steps=90, batch_size=16), resume=True)


def test_capacity_depends_on_the_steps_where_the_rate_does_not(data, tmp_path, undrawn):
    constant = replace(SHORT, decay=0.0)
    for objective in ("anneal", "beta"):
        train_vae(fresh(objective), data, tmp_path / objective, constant)
    train_vae(fresh("beta"), data, tmp_path / "beta", replace(constant, steps=7), resume=True)
    with pytest.raises(InputError, match="steps 6, cannot be resumed with 7: the capacity depends on it"):
        train_vae(fresh("anneal"), data, tmp_path / "anneal", replace(constant, steps=7), resume=True)


def test_parts_of_a_batch_are_summed_up_for_the_log(data, tmp_path, undrawn):
    x = torch.randint(256, (8, 16, 16, 3), dtype=torch.uint8)
    found = []
    for parts in (1, 2):
        model = fresh()
        for module in model.modules():  # whose statistics would be of a part
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.train = lambda *_: None
        recipe = replace(SHORT, batch_size=8, accumulate=parts, log_every=1)
        found.append(VAETraining(model, recipe).advance(x, torch.arange(8)))
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert float(value) == pytest.approx(float(found[1][name]), rel=1e-4), name


@pytest.mark.parametrize("objective", OBJECTIVES[1:])
def test_an_objective_of_the_whole_batch_refuses_parts_of_it(objective, monkeypatch):
    said = f"must be 1 for objective '{objective}', which is of a whole batch$"
    with pytest.raises(InputError, match=f"^accumulate is 2, {said}"):
        VAETraining(fresh(objective), replace(SHORT, accumulate=2))
    two = type("Two", (), {"size": 2})
    monkeypatch.setattr("encdiff.baselines.training.processes", two)
    with pytest.raises(InputError, match=f"^processes is 2, {said}"):
        VAETraining(fresh(objective), SHORT)


def test_bad_arguments_of_a_training(data, tmp_path):
    for args, said in (
        ((EncDiff(TINY), data, SHORT), "^model is a EncDiff|^model is an EncDiff, must be a VAE"),
        ((fresh(), "procedural", SHORT), "^dataset is a str, must be a Dataset: open_dataset makes one$"),
        ((fresh(), data, "beta-vae"), "^config is a str, must be a VAETrainConfig: vae_recipe makes one$"),
        ((fresh(image_size=32), data, SHORT), "images of 16, the model takes 32$"),
        ((fresh("tc"), data, replace(SHORT, batch_size=1)), "^batch_size is 1, must be at least 2 for objective 'tc'$"),
    ):
        with pytest.raises(InputError, match=said):
            train_vae(args[0], args[1], tmp_path / "run", args[2])
    assert not (tmp_path / "run").exists()


def test_a_compiled_step_is_the_eager_one(monkeypatch):
    """What `_loss` writes beside its loss, too; compiled without a compiler of code, which takes a minute."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled(f, backend="aot_eager", fullgraph=True, **how))
    x = torch.randint(256, (5, 16, 16, 3), dtype=torch.uint8)
    eager, fast = (VAETraining(fresh("anneal"), replace(SHORT, engine=e, log_every=1)) for e in ("eager", "compile"))
    for step in range(2):  # C changes, and nothing is compiled anew for it
        one, other = eager.advance(x, torch.arange(5)), fast.advance(x, torch.arange(5))
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert float(value) == pytest.approx(float(other[name]), rel=1e-4, abs=1e-6), (step, name)


def test_any_vae_is_evaluated_as_an_encdiff(data):
    scores = evaluate(fresh(), data, metrics=["mig", "counterfactual"], protocol="quick", pairs=8)
    assert 0 <= scores["mig"]["mig"] <= 1 and "counterfactual" in scores


# -- commands


@pytest.fixture
def encdiff(monkeypatch, capsys):
    """The command line: exit code and what it prints."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["encdiff", *map(str, args)])
        with pytest.raises(SystemExit) as exited:
            app.main()
        out, err = capsys.readouterr()
        return exited.value.code or 0, out + err

    return call


def test_one_run_by_the_command_line(tmp_path, encdiff, monkeypatch):
    monkeypatch.setitem(recipes.PRESETS, "annealvae", tiny("anneal"))
    run = tmp_path / "run"
    begin = ("train", "--preset", "annealvae", "--data", DATA, "--run", run, "--steps", 3, "--batch-size", 5)
    assert encdiff(*begin, "--set", "capacity=4", "--set", "gamma=7.5")[0] == 0
    described = json.loads((run / "config.json").read_text())["model"]
    assert (described["kind"], described["capacity"], described["gamma"]) == ("vae", 4, 7.5)
    code, text = encdiff("train", "--run", run, "--resume")
    assert code == 0 and "is at its last step already" in text
    for args in (
        ("evaluate", run, "--protocol", "quick", "--metrics", "mig", "--no-baseline"),
        ("swap", run, "--pairs", 2),
        ("traverse", run, "--values", 2),
        ("interpolate", run, "--values", 2),
        ("sample", run, "--count", 2),
        ("direction", run, "--factor", "scale", "--images", 1, "--strengths", 2),
    ):
        code, text = encdiff(*args)
        assert code == 0, text
    made = {"swap.png", "traverse.png", "interpolate.png", "sample.png", "direction-scale.png"}
    assert made <= {p.name for p in (run / "pictures").iterdir()}
    for args in (("attend", run), ("edit", run, "--concept", 0, "--as", 1)):
        code, text = encdiff(*args)
        assert code == 2 and "is of a VAE, which has no cross-attention" in text.replace("\n", " ")


@pytest.mark.parametrize(
    "args, said",
    [
        (("--timesteps", "power"), "--timesteps is given, must be left out: it is of an EncDiff, this is a VAE"),
        (("--first-stage", "runs/vq"), "--first-stage is given"),
        (("--shard",), "--shard is given"),
        (("--checkpoint-activations",), "--checkpoint-activations is given"),
        (("--set", "capacity"), "--set 'capacity': must be NAME=VALUE, NAME one of image_size"),
        (("--set", "gama=1"), "--set 'gama=1': must be NAME=VALUE"),
        (("--set", "gamma=1"), "--set: gamma is 1, but objective 'beta' has none"),
        (("--set", "concepts=many"), "--set: concepts is 'many', must be an integer"),
        (("--resume",), "config.json"),
    ],
)
def test_what_the_command_refuses(tmp_path, encdiff, args, said):
    preset = () if args == ("--resume",) else ("--preset", "beta-vae", "--data", DATA)
    code, text = encdiff("train", *preset, "--run", tmp_path / "run", *args)
    assert code == 2 and said in text.replace("\n", " "), text
    assert not (tmp_path / "run").exists()
