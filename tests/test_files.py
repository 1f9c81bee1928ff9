"""Files before they are believed: JSON within limits, no FIFOs, numbers of ASCII digits, messages of one line."""

import json
import os
import socket

import pytest

from encdiff import EncDiffConfig, InputError
from encdiff.cli.support import Commands, begun_size, factor_groups
from encdiff.evaluation import evaluate_codes, read_scores
from encdiff.files.reading import read_json, read_text, refuse_special, whole_number
from encdiff.metrics.reconstruction import load_lpips
from encdiff.models.config import BLOCKS
from encdiff.training import AutoencoderTrainConfig, TrainConfig
from encdiff.training.runs import last_row, read_config

BAD_JSON = {
    "deep": "[" * 100_000,
    "deep and closed": '{"a":' * 40 + "1" + "}" * 40,
    "digits": '{"a": ' + "9" * 400 + "}",
    "negative digits": "[-" + "9" * 30 + "]",
    "large": "1e999",
    "nan": '{"a": NaN}',
    "infinity": "-Infinity",
    "twice": '{"a": 1, "b": {"c": 1, "c": 2}}',
    "cut": '{"a": ',
    "empty": "",
    "text": "hello\nthere",
    "bytes": b"\xff\xfe{\x00}\x00",
    "nul": '{"a": "\x00"}',
}


def put(path, content):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_one_line_with_the_file(tmp_path, content):
    with pytest.raises(InputError, match=r"x\.json: not JSON") as error:
        read_json(put(tmp_path / "x.json", content))
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_good_json(tmp_path):
    value = {"a": [1, -2.5, 1e-300, 2**63, None, True, "[[[[" * 50, '"\\"[' * 50], "b": {"c": {}}}
    assert read_json(put(tmp_path / "x.json", "\ufeff" + json.dumps(value))) == value
    assert read_json(put(tmp_path / "x.json", "[" * 32 + "]" * 32))


def test_a_large_file_is_not_read(tmp_path):
    with open(tmp_path / "x.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match="holds more than"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize("content", BAD_JSON.values(), ids=BAD_JSON)
def test_every_reader_of_json_reads_so(tmp_path, content):
    """Configurations of models, first stages and runs, and scores."""
    from encdiff import EncDiff
    from encdiff.models.autoencoder import VQAutoencoder

    put(tmp_path / "model.safetensors", "")
    put(tmp_path / "config.json", content)
    put(tmp_path / "metrics.json", content)
    for read in (EncDiff.from_pretrained, VQAutoencoder.from_pretrained, read_config):
        with pytest.raises(InputError, match=r"config\.json: not JSON"):
            read(tmp_path)
    for read in (lambda p: read_scores(p / "metrics.json"), lambda p: factor_groups(p, None)):
        with pytest.raises(InputError, match=r"metrics\.json: not JSON .*evaluate again"):
            read(tmp_path)


SCORES = {
    "dci": {"disentanglement": 1.0, "completeness": 1, "informativeness_test": 0.5, "importance": [[1, 0.0]] * 3},
    "protocol": {"name": "paper", "seed": 0},
    "data": {"name": "x", "factor_names": ["a", "b"]},
}


def test_scores_are_read_back(tmp_path):
    path = put(tmp_path / "m.json", json.dumps({"trained": SCORES, "untrained": SCORES}))
    assert read_scores(path)["trained"] == SCORES
    undefined = SCORES | {"irs": {"irs": None, "undefined": "constant"}}
    assert read_scores(put(path, json.dumps({"trained": undefined})))["trained"]["irs"]["irs"] is None


@pytest.mark.parametrize(
    "change",
    [
        {"dci": None},
        {"dci": SCORES["dci"] | {"importance": [[1, "2"]] * 3}},
        {"dci": SCORES["dci"] | {"importance": [[1, 2], [1]]}},
        {"dci": SCORES["dci"] | {"importance": []}},
        {"dci": SCORES["dci"] | {"importance": [[1, True]] * 3}},
        {"dci": SCORES["dci"] | {"disentanglement": "high"}},
        {"dci": SCORES["dci"] | {"completeness": [1]}},
        {"dci": {k: v for k, v in SCORES["dci"].items() if k != "disentanglement"}},
        {"mig": {"mig": None}},
        {"data": {"factor_names": "ab"}},
        {"data": {"factor_names": [1, 2]}},
        {"data": []},
        {"protocol": {"name": 1, "seed": 0}},
        {"protocol": {"name": "paper"}},
        {"factor_vae": {"eval_accuracy": 0.5, "num_active_dims": "3"}},
    ],
)
def test_scores_of_wrong_types(tmp_path, change):
    path = put(tmp_path / "m.json", json.dumps({"trained": SCORES | change}))
    with pytest.raises(InputError, match=r"m\.json: not the scores .*; evaluate again"):
        read_scores(path)


@pytest.mark.parametrize(
    "config, changes",
    [
        (EncDiffConfig, dict(transformer_depth=2**31)),
        (EncDiffConfig, dict(transformer_depth=64, depth=64)),
        (EncDiffConfig, dict(multipliers=(1,) * 17)),
        (EncDiffConfig, dict(multipliers=(2**40,))),
        (EncDiffConfig, dict(bank_widths=(1,) * 10**5)),
        (EncDiffConfig, dict(vq_multipliers=(1,) * 10**4)),
        (EncDiffConfig, dict(num_timesteps=10**12)),
        (EncDiffConfig, dict(patch=10**9)),
        (EncDiffConfig, dict(scaling_factor=10**400)),
        (EncDiffConfig, dict(scaling_factor=1e300)),
        (EncDiffConfig, dict(attention_levels=(10**30,))),
        (TrainConfig, dict(steps=10**30)),
        (TrainConfig, dict(seed=2**63)),
        (TrainConfig, dict(batch_size=2**31 - 1)),
        (TrainConfig, dict(learning_rate=10**400)),
        (AutoencoderTrainConfig, dict(disc_layers=2**31)),
        (AutoencoderTrainConfig, dict(seed=2**70)),
    ],
)
def test_every_number_of_a_configuration_has_an_upper_bound(config, changes):
    name = next(iter(changes))
    with pytest.raises(InputError, match=f"^c.json: .*{name}.* must be") as error:
        config.from_dict(changes, "c.json")
    assert len(str(error.value)) < 500


def test_every_numeric_field_has_an_upper_bound():
    for config in (EncDiffConfig, TrainConfig, AutoencoderTrainConfig):
        for name, value in vars(config()).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            for wrong in (10**400, 10**31, float("inf"), float("nan")):
                with pytest.raises(InputError, match=f"{name}.* must be"):
                    config.from_dict({name: wrong})
    assert BLOCKS > 3 * 3 * 2 * 4 * 2, "the paper's, several times over"


def special(kind, path):
    if kind == "fifo":
        os.mkfifo(path)
        return path
    if kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        return path
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize("kind", ["fifo", "socket", "device"])
def test_what_is_no_file_is_refused_at_once(kind, tmp_path, monkeypatch):
    from encdiff import EncDiff
    from encdiff.data import open_dataset
    from encdiff.data.celeba import CelebA

    monkeypatch.chdir(tmp_path)
    path = special(kind, tmp_path / "thing.npz")
    readers = [refuse_special, read_json, open_dataset, evaluate_codes, load_lpips, EncDiff.load_published]
    readers += [last_row, lambda p: read_text(p, 10)]
    for read in readers:
        with pytest.raises(InputError, match="thing.npz: is a (FIFO|socket|device), must be a file|needs the package"):
            read(path)
    for name in ("pictures", "norb", "faces", "db"):
        (tmp_path / name).mkdir()
    special(kind, tmp_path / "pictures" / "a.png")
    with pytest.raises(InputError, match="no images"):
        open_dataset("pictures", 8)
    special(kind, tmp_path / "norb" / "x-dat.mat")
    with pytest.raises(InputError, match="no images"):
        open_dataset("norb", 8)
    special(kind, tmp_path / "db" / "data.mdb")
    with pytest.raises(InputError, match="no images"):
        open_dataset("db", 8)
    special(kind, tmp_path / "faces" / "1.jpg")
    put(tmp_path / "faces" / "list_attr_celeba.txt", "1\nYoung\n1.jpg 1\n")
    with pytest.raises(InputError, match=r"1\.jpg: is a|is a (FIFO|socket|device)"):
        CelebA("faces", 8).images([0])


def test_whole_numbers_are_ascii_digits():
    assert [whole_number(t) for t in ("0", "12", "007")] == [0, 12, 7]
    for text in ("\u00b2", "\u0663", "-1", "+1", " 1", "1\n", "1.0", "", "1_0", "9" * 40, None, 3):
        assert whole_number(text) is None


def test_messages_are_one_line_without_control_characters():
    error = InputError("a\n  b\r\nc\x1b[2J\u202e\udcff d  e")
    assert str(error) == r"a b c\x1b[2J\u202e\udcff d  e" and error.args == (str(error),)


def test_a_file_that_ends_early_is_no_abort():
    import typer

    app = typer.Typer(cls=Commands)

    @app.command()
    def one() -> None:
        raise EOFError("Compressed file ended before the end-of-stream marker was reached")

    @app.command()
    def two() -> None: ...

    with pytest.raises(InputError, match="ends too early"):
        app(["one"])


def test_a_run_without_the_size_of_its_images(tmp_path):
    put(tmp_path / "config.json", json.dumps({"model": {}, "training": {}, "data": "x"}))
    with pytest.raises(InputError, match="names no image_size"):
        begun_size(read_config(tmp_path), tmp_path)
    put(tmp_path / "config.json", json.dumps({"model": {}, "training": {}, "data": "x", "fingerprint": [1]}))
    with pytest.raises(InputError, match="not the configuration of a training run"):
        read_config(tmp_path)
