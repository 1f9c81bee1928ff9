import json
import signal
from dataclasses import asdict, replace

import pytest
import torch
from _tiny import TINY, shaken

from encdiff import EncDiff, EncDiffConfig, InputError
from encdiff.data import describe, open_dataset, to_float
from encdiff.errors import Stopped
from encdiff.experiments.ablations import ABLATIONS, ablate, ablated
from encdiff.files.checkpoint import load_tensors
from encdiff.models import PRESETS
from encdiff.models.config import OBJECTIVES
from encdiff.pictures import swap_grid, traversal
from encdiff.training import RECIPES, TrainConfig, train

VECTORS, ADAGN = replace(TINY, concept_width=5), replace(TINY, conditioning="adagn")


def made_up(model, dataset, *, protocol, baseline) -> dict:
    """In the form of `evaluate_model`: numbers that differ from model to model, in place of scores that take long."""
    assert not baseline
    codes = model.encode(to_float(dataset.images(range(32)))).detach()
    assert codes.shape == (32, *model.config.code_shape)
    score = codes.std().item() % 1
    dci = {"disentanglement": score, "completeness": 0.5, "informativeness_test": 0.6, "importance": [[score] * 6] * 3}
    code = "scalars" if model.config.concept_width == 1 else "first principal component of each concept's 16 numbers"
    settings = {"name": protocol, "seed": 0, "code": code}
    data = describe(dataset)
    return {"trained": {"factor_vae": {"eval_accuracy": 0.7}, "dci": dci, "protocol": settings, "data": data}}


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_trains_samples_and_is_read_back(name, images, tmp_path):
    model = shaken(replace(TINY, **ABLATIONS[name])).train()
    model.loss(images).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in (*model.unet.parameters(), *model.bank.parameters()))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.encoder.parameters())
    model.save_pretrained(tmp_path / "model")
    loaded = EncDiff.from_pretrained(tmp_path / "model")
    assert loaded.config == model.config and asdict(loaded.config).items() >= ABLATIONS[name].items()
    sampled = loaded.reconstruct(images, steps=2)
    assert sampled.isfinite().all() and torch.equal(sampled, model.reconstruct(images, steps=2))


def test_each_changes_its_fields_and_nothing_else():
    presets = PRESETS.keys() - OBJECTIVES  # which may not go together: anchors and vectors
    for name, changes in ABLATIONS.items():
        for preset in presets:
            before, after = asdict(PRESETS[preset]), asdict(ablated(preset, name))
            assert {k for k in before if before[k] != after[k]} == {k for k in changes if before[k] != changes[k]}
        assert any(ablated(preset, name) != PRESETS[preset] for preset in presets) or name == "unchanged"
    with pytest.raises(InputError, match="ablation 'scalars' is unknown, must be one of unchanged, vectors, shared"):
        ablated("quickstart", "scalars")


def test_a_configuration_from_before_the_ablations_is_the_papers():
    old = asdict(PRESETS["shapes3d"])
    for field in ("concept_width", "bank_shared", "conditioning"):
        del old[field]
    assert EncDiffConfig.from_dict(old) == PRESETS["shapes3d"]


def test_vectors_give_each_concept_a_slice_of_the_encoders_output(images):
    model = shaken(VECTORS)
    codes = model.encode(images)
    assert codes.shape == (4, 3, 5)
    torch.testing.assert_close(codes.flatten(1), model.encoder(images))
    moved = codes.clone()
    moved[:, 1] += 1
    changed = (model.tokens(moved) - model.tokens(codes)).abs().amax((0, 2))
    assert changed[1] > 1e-3 and changed[[0, 2]].max() == 0
    with pytest.raises(InputError, match=r"scalars are \(4, 15\), must be \(B, 3, 5\)"):
        model.tokens(codes.flatten(1))


def test_vectors_are_swapped_whole_and_traversed_by_vectors(images):
    model = shaken(VECTORS)
    source, target = images[:2], images[2:]
    codes = model.encode(target).detach().clone()
    codes[:, [0, 2]] = model.encode(source)[:, [0, 2]].detach()
    torch.testing.assert_close(model.swap(source, target, [0, 2], steps=2), model.sample(codes, steps=2))
    assert swap_grid(model, source, target, groups={"a": [1]}, steps=1).width > 300

    values = torch.randn(3, 5)
    codes = model.encode(images[:1]).detach().repeat(3, 1, 1)
    codes[:, 1] = values
    torch.testing.assert_close(model.traverse(images[0], 1, values, steps=2), model.sample(codes, steps=2))
    with pytest.raises(InputError, match="must be a list of vectors of 5 finite numbers"):
        model.traverse(images[0], 1, [0.0, 1.0])
    with pytest.raises(InputError, match="must be a list of finite numbers"):
        shaken(TINY).traverse(images[0], 1, values)
    with pytest.raises(InputError, match=r"codes are \(4, 3, 5\), must be finite numbers \(n, 3\)"):
        traversal(model, images[0], model.encode(images))


def test_a_shared_bank_treats_all_concepts_alike(images):
    model, own = shaken(replace(TINY, bank_shared=True)), shaken(TINY)
    scalars = model.encode(images)
    torch.testing.assert_close(model.tokens(scalars.flip(1)), model.tokens(scalars).flip(1))
    assert not torch.allclose(own.tokens(scalars.flip(1)), own.tokens(scalars).flip(1), atol=1e-2)
    count = [sum(p.numel() for p in m.bank.parameters()) for m in (model, own)]
    assert count[1] == TINY.concepts * count[0]
    assert {name.split(".")[0] for name in model.bank.state_dict()} == {"0"}


def test_adagn_adds_the_tokens_to_the_timesteps_embedding(images):
    model = shaken(ADAGN)
    unet, x_t, t = model.unet, torch.randn(4, *model.latent_shape), torch.tensor([0, 9, 500, 999])
    assert not any("attn2" in name or "norm2" in name for name in unet.state_dict())
    assert any("attn1" in name for name in unet.state_dict())
    tokens, seen = model.tokens(model.encode(images)), []
    unet.time_embed.register_forward_hook(lambda *io: seen.append(io[2]))
    block = unet.middle_block[0]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(torch.cat(inputs[1], dim=1)))
    out = model.denoise(x_t, t, tokens)
    weight, bias = unet.concept_embed.weight, unet.concept_embed.bias
    torch.testing.assert_close(seen[1], block.emb_layers(seen[0] + tokens.reshape(4, -1) @ weight.T + bias))
    assert not torch.allclose(out, model.denoise(x_t, t, tokens.flip(0)), atol=1e-3)


def test_adagn_has_no_attention_to_show_or_to_bias(images):
    model = shaken(ADAGN)
    for call in (lambda: model.attention_maps(images), lambda: model.reconstruct(images, token_bias=torch.zeros(4, 3))):
        with pytest.raises(InputError, match="conditioning is 'adagn': there is no attention to concepts"):
            call()
    with pytest.raises(InputError, match="conditioning is 'adagn', needs scale_shift"):
        replace(ADAGN, scale_shift=False)


@pytest.fixture
def small(monkeypatch):
    """The preset `quickstart` and its recipe small enough for a test, scores that are made up; the data."""
    monkeypatch.setitem(PRESETS, "quickstart", TINY)
    monkeypatch.setitem(RECIPES, "quickstart", TrainConfig(steps=3, batch_size=4, warmup=1, checkpoint_every=2))
    monkeypatch.setattr("encdiff.experiments.phases.evaluate_model", made_up)
    monkeypatch.setattr("encdiff.training.step.Training.picture", lambda *_: None)  # most of the time of so short a run
    return open_dataset("procedural:2,2,2,2,2,2", TINY.image_size)


def test_what_the_preset_is_already_is_left_out(small, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "quickstart", replace(TINY, concepts=20))
    for name in ("train_once", "score_once", "write_tables"):
        monkeypatch.setattr(f"encdiff.experiments.ablations.{name}", lambda *_, **__: None)
    said = []
    ablate(small, tmp_path, say=said.append)
    assert [line.split()[1].rstrip(",") for line in said] == [
        n for n in ABLATIONS if n not in ("tokens-20", "width-4", *OBJECTIVES)
    ]


def test_the_table_grows_and_finished_runs_are_not_repeated(small, tmp_path, monkeypatch):
    said = []
    options = dict(protocol="quick", say=said.append)
    rows = ablate(small, tmp_path, only=["vectors", "unchanged"], seeds=2, **options)
    assert [(row["ablation"], row["seed"]) for row in rows] == [
        (n, s) for n in ("unchanged", "vectors") for s in (0, 1)
    ]
    assert said[0] == f"1/4 vectors, seed 0: {tmp_path / 'vectors-seed0'}" and len(said) == 4
    assert json.loads((tmp_path / "ablations.json").read_text())["runs"] == rows
    assert {row["protocol"]["code"] for row in rows} == {
        "scalars", "first principal component of each concept's 16 numbers"
    }  # fmt: skip
    encoder, bank = 128 * 3 * 15 + 45, 3 * 8 * 15  # what 16 numbers instead of one add to TINY
    assert rows[2]["parameters"] - rows[0]["parameters"] == encoder + bank
    for row in rows:
        assert row["steps"] == 3 and row["ms_per_step"] > 0 and 0 <= row["scores"]["DCI disentanglement"] <= 1

    monkeypatch.setattr("encdiff.experiments.phases.evaluate_model", None)  # every score is there already
    monkeypatch.setattr("encdiff.experiments.phases.train", None)
    assert ablate(small, tmp_path, only=["unchanged"], **options) == rows
    table = (tmp_path / "ablations.md").read_text()
    lines = [line.split(" | ") for line in table.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == ["| unchanged", "| vectors"]
    assert lines[3][1:5] == ["concept_width 16", f"{rows[2]['parameters']:,}", "2", "3"]
    means = [sum(row["scores"]["DCI disentanglement"] for row in rows[i : i + 2]) / 2 for i in (0, 2)]
    assert [line[7].split()[0] for line in lines[2:]] == [f"{mean:.3f}" for mean in means]


def test_an_interrupted_run_goes_on(small, tmp_path, monkeypatch):
    def interrupted(*args, **options):
        train(*args, **options, on_step=lambda training: training.step == 2 and signal.raise_signal(signal.SIGINT))

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="the same command continues"):
        patch.setattr("encdiff.experiments.phases.train", interrupted)
        ablate(small, tmp_path / "a", only=["adagn"], protocol="quick", say=str)
    assert load_tensors(tmp_path / "a" / "adagn-seed0" / "checkpoint.safetensors")[1]["step"] == "2"
    assert not (tmp_path / "a" / "ablations.md").exists()
    for out in ("a", "unbroken"):
        ablate(small, tmp_path / out, only=["adagn"], protocol="quick", say=str)
    resumed, unbroken = (
        load_tensors(tmp_path / out / "adagn-seed0" / "model" / "model.safetensors")[0] for out in ("a", "unbroken")
    )
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)


def test_bad_input(small, tmp_path, monkeypatch):
    ablate(small, tmp_path, only=["unchanged"], protocol="quick", say=str)
    with pytest.raises(InputError, match="unchanged-seed0: was begun with batch_size 4, cannot be resumed with 8"):
        ablate(small, tmp_path, only=["unchanged"], batch_size=8, learning_rate=2.56e-4)
    (tmp_path / "unchanged-seed0" / "metrics.json").write_text("[]")
    with pytest.raises(InputError, match="metrics.json: not the scores that encdiff evaluate writes"):
        ablate(small, tmp_path, only=["unchanged"], protocol="quick", say=str)
    with pytest.raises(InputError, match="must be one of unchanged"):
        ablate(small, tmp_path / "new", only=["unchanged", "nothing"])
    with pytest.raises(InputError, match="preset 'best' is unknown"):
        ablate(small, tmp_path / "new", preset="best")
    with pytest.raises(InputError, match="first_stage .--first-stage. is x: this preset takes none"):
        ablate(small, tmp_path / "new", first_stage="x", say=str)
    monkeypatch.setattr(small, "factor_sizes", ())
    with pytest.raises(InputError, match="procedural: has no factors"):
        ablate(small, tmp_path / "new")
    assert not (tmp_path / "new").exists()
