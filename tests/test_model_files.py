"""A folder of a model: its configuration and its weights belong together."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from encdiff import EncDiff, InputError
from encdiff.files import checkpoint


def test_weights_of_another_configuration_are_refused(tmp_path, model, monkeypatch):
    """Of the same shapes: a schedule, say. Folders from before the weights knew it are read as they are."""
    monkeypatch.setattr(checkpoint, "ATTEMPTS", 2)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    other = json.loads(text) | {"beta_end": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="model.safetensors: of another configuration than .*config.json; both must"):
        EncDiff.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    tensors, _ = checkpoint.load_tensors(tmp_path / "model.safetensors")
    checkpoint.save_tensors(tmp_path / "model.safetensors", tensors, {"format": "pt"})
    assert EncDiff.from_pretrained(tmp_path).config == model.config


def test_a_folder_is_read_whole_while_it_is_written(tmp_path, model):
    """Two configurations in turns: what is read is one of them."""
    others = [model, EncDiff(replace(model.config, beta_end=0.02))]
    torch.nn.init.constant_(others[1].unet.out[0].bias, 7.0)
    others[0].save_pretrained(tmp_path)
    done = threading.Event()

    def write():
        for n in range(30):
            others[n % 2].save_pretrained(tmp_path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    read = 0
    while not done.is_set():
        try:
            found = EncDiff.from_pretrained(tmp_path)
        except InputError as error:  # both files changed within one reading
            assert "replaced while it was read" in str(error) or "another configuration" in str(error)
            continue
        read += 1
        assert (found.config.beta_end == 0.02) == bool((found.unet.out[0].bias == 7).all())
    writer.join()
    assert read
