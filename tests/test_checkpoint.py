import json
import pickle
import sys
import types
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from _golden import FOLDER, draw, load, relative_error, weight
from _tiny import TINY
from huggingface_hub.errors import OfflineModeIsEnabled

from encdiff import EncDiff, InputError
from encdiff.files.checkpoint import load_tensors, save_tensors
from encdiff.files.temporaries import atomic_path


@pytest.fixture
def model():
    torch.manual_seed(0)
    return EncDiff(replace(TINY, scaling_factor=0.25)).eval()


def same(a: EncDiff, b: EncDiff) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_tensors_round_trip_with_shared_storage(tmp_path):
    stacked = torch.randn(3, 4)
    save_tensors(tmp_path / "a.safetensors", {"x": stacked[0], "y": stacked[1:].T}, {"step": "7"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], stacked[0]) and torch.equal(tensors["y"], stacked[1:].T)
    assert metadata == {"step": "7"}


def test_others_may_read_it_as_the_umask_says(tmp_path):
    (tmp_path / "other").touch()
    save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="a.safetensors: not a whole safetensors file"):
        load_tensors(path)
    path.write_bytes(b"not at all")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_tensors(path)


@pytest.mark.parametrize("ema", [True, False])
def test_published_round_trip(model, tmp_path, ema):
    model.save_published(tmp_path / "m.ckpt")
    loaded = EncDiff.load_published(tmp_path / "m.ckpt", TINY, ema=ema)
    assert same(model, loaded) and loaded.config.scaling_factor == 0.25


def test_the_ema_copy_is_selectable(model, tmp_path):
    model.save_published(tmp_path / "m.ckpt")
    content = torch.load(tmp_path / "m.ckpt", weights_only=True)
    # a real file names its copy so: `model.` and the dots gone
    name = "model_ema.diffusion_modelinput_blocks00weight"
    content["state_dict"][name] = content["state_dict"][name] + 1
    content["state_dict"]["betas"] = torch.zeros(1000)
    content["state_dict"]["first_stage_model.loss.discriminator.weight"] = torch.zeros(1)
    torch.save(content, tmp_path / "m.ckpt")
    own = model.unet.input_blocks[0][0].weight
    plain = EncDiff.load_published(tmp_path / "m.ckpt", TINY, ema=False)
    averaged = EncDiff.load_published(tmp_path / "m.ckpt", TINY)
    assert torch.equal(plain.unet.input_blocks[0][0].weight, own)
    assert torch.equal(averaged.unet.input_blocks[0][0].weight, own + 1)
    del content["state_dict"][name]
    torch.save(content, tmp_path / "m.ckpt")
    with pytest.raises(
        InputError, match="no EMA copy of model.diffusion_model.input_blocks.0.0.weight; load it with ema=False"
    ):
        EncDiff.load_published(tmp_path / "m.ckpt", TINY)


def test_mismatches_are_listed(model, tmp_path):
    model.save_published(tmp_path / "m.ckpt")
    with pytest.raises(InputError, match=r"m.ckpt: does not fit .*\d+ missing: .*; \d+ of another shape: .*instead of"):
        EncDiff.load_published(tmp_path / "m.ckpt", replace(TINY, concepts=4))
    with pytest.raises(InputError, match=r"\d+ unexpected: "):
        EncDiff.load_published(tmp_path / "m.ckpt", replace(TINY, multipliers=(1,), attention_levels=(0,)))


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


class Callback:
    """Of a module that a reader does not have, as in Lightning's files."""

    __module__ = "lightning_of_then"


def test_objects_in_a_checkpoint_are_ignored_and_never_run(model, tmp_path, monkeypatch):
    """Lightning's files hold classes as keys, objects with state, and whatever an attacker put there."""
    module = types.ModuleType(Callback.__module__)
    module.Callback = Callback
    monkeypatch.setitem(sys.modules, Callback.__module__, module)
    Callback.__qualname__ = "Callback"
    path, callback = tmp_path / "m.ckpt", Callback()
    callback.best = 3
    model.save_published(path)
    content = torch.load(path, weights_only=True)
    torch.save(content | {"callbacks": {Callback: {"x": callback}}, "hyper_parameters": Bomb()}, path)
    monkeypatch.delitem(sys.modules, Callback.__module__)
    assert same(model, EncDiff.load_published(path, TINY))


def test_what_is_no_published_checkpoint(model, tmp_path):
    def fails(name, message):
        with pytest.raises(InputError, match=f"{name}: {message}"):
            EncDiff.load_published(tmp_path / name, TINY)

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    fails("bomb.ckpt", "holds no state_dict")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb()))
    fails("plain.ckpt", "not a whole checkpoint")
    torch.save([1, 2], tmp_path / "list.ckpt")
    fails("list.ckpt", "holds no state_dict")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.ckpt")
    fails("other.ckpt", "holds no tensor of model.diffusion_model.")
    save_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    fails("x.safetensors", "not a whole checkpoint")
    model.save_published(tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-100])
    fails("cut.ckpt", "not a whole checkpoint")
    fails("none.ckpt", "no such file")


def test_a_checkpoint_with_the_published_names_and_shapes_loads(tmp_path):
    layout = json.loads((FOLDER / "checkpoint_layout.json").read_text())
    state = {name: weight(name, tuple(shape)) for name, shape in layout.items() if "num_batches" not in name}
    state |= {name: torch.tensor(0) for name in layout if "num_batches" in name}
    torch.save(
        {"state_dict": state | {"scale_factor": torch.tensor(0.5), "betas": torch.zeros(1000)}}, tmp_path / "p.ckpt"
    )
    model = EncDiff.load_published(tmp_path / "p.ckpt", ema=False)
    assert model.config.scaling_factor == 0.5 and not model.training
    golden = load("unet_paper")
    with torch.no_grad():
        x, tokens = draw("unet_paper:x", (2, 3, 16, 16)), draw("unet_paper:context", (2, 20, 16))
        assert relative_error(model.denoise(x, torch.from_numpy(golden["t"]), tokens), golden["y"]) < 1e-4
        images = draw("encoder:image", (4, 3, 64, 64)).tanh()
        assert relative_error(model.tokens(model.encode(images)), load("encoder_paper")["tokens"]) < 1e-4


def test_a_full_disk_keeps_the_older_model(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}

    def full(tensors, path, metadata=None):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("encdiff.files.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left on device: .*model/model.safetensors"):
        model.save_pretrained(tmp_path / "model")
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before


def test_bad_model_folders(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "encdiff.files.checkpoint.hf_hub_download", Mock(side_effect=OfflineModeIsEnabled("no network"))
    )
    with pytest.raises(InputError, match=r"neither a folder here nor a model that the Hub gave \(no network\)"):
        EncDiff.from_pretrained("owner/model")
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())

    def fails(message):
        with pytest.raises(InputError, match=message):
            EncDiff.from_pretrained(folder)

    (folder / "config.json").write_text(json.dumps(values | {"concepts": 4}))
    fails("model.safetensors: does not fit this configuration")
    (folder / "config.json").write_text(json.dumps(values | {"wings": 2}))
    fails("config.json: unknown entries wings")
    for change, message in (
        ({"image_size": "16"}, "config.json: image_size is '16', must be an integer at least 1"),
        ({"image_size": 16.0}, "image_size is 16.0, must be an integer"),
        ({"scaling_factor": None}, "scaling_factor is None, must be a number above 0"),
        ({"multipliers": None}, "multipliers is None, must be a list, each an integer at least 1"),
        ({"bank_widths": 8}, "bank_widths is 8"),
        ({"groups": 0}, "groups is 0"),
        ({"prediction": "eps"}, "prediction is 'eps', must be one of 'epsilon', 'v', 'x0'"),
        ({"loss": "l3"}, "loss is 'l3'"),
        ({"bank_activation": "tanh"}, "bank_activation is 'tanh'"),
        ({"vq_multipliers": []}, "must hold at least one level"),
    ):
        (folder / "config.json").write_text(json.dumps(values | change))
        fails(message)
    (folder / "config.json").write_text("[1]")
    fails("config.json: holds list, must be an object")
    (folder / "config.json").write_text("{")
    fails("config.json: not JSON")
    (folder / "config.json").unlink()
    fails("no config.json in it")
