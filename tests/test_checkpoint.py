import json
import pickle
from dataclasses import replace

import pytest
import torch
from _tiny import TINY

from encdiff import EncDiff, InputError
from encdiff.checkpoint import atomic_path, load_tensors, save_tensors


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


def test_untrusted_files_are_not_unpickled(tmp_path):
    for name, content in (("torch.ckpt", None), ("plain.ckpt", pickle.dumps(Bomb()))):
        path = tmp_path / name
        torch.save({"state_dict": Bomb()}, path) if content is None else path.write_bytes(content)
        with pytest.raises(InputError, match=f"{name}: not a checkpoint of tensors .*trusted=True"):
            EncDiff.load_published(path, TINY)
    torch.save([1, 2], tmp_path / "list.ckpt")
    with pytest.raises(InputError, match="holds no state_dict"):
        EncDiff.load_published(tmp_path / "list.ckpt", TINY)
    with pytest.raises(InputError, match="no such file"):
        EncDiff.load_published(tmp_path / "none.ckpt", TINY)


def test_bad_model_folders(model, tmp_path):
    folder = tmp_path / "model"
    with pytest.raises(InputError, match="neither a folder here nor a model that the Hub gave"):
        EncDiff.from_pretrained(str(folder))
    model.save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())

    def fails(message):
        with pytest.raises(InputError, match=message):
            EncDiff.from_pretrained(folder)

    (folder / "config.json").write_text(json.dumps(values | {"concepts": 4}))
    fails("model.safetensors: does not fit this configuration")
    (folder / "config.json").write_text(json.dumps(values | {"wings": 2}))
    fails("config.json: unknown entries wings")
    (folder / "config.json").write_text("{")
    fails("config.json: not JSON")
    (folder / "config.json").unlink()
    fails("no config.json in it")
