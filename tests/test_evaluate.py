import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from encdiff import evaluate as module
from encdiff.data import Dataset, describe
from encdiff.errors import InputError
from encdiff.evaluate import encode_dataset, evaluate, format_table, plot_importance, write_metrics

QUICK = dict(
    factor_vae_variance=300, factor_vae_train=200, factor_vae_eval=100, factor_vae_batch=32, dci_train=80, dci_test=40
)


class Pixels(Dataset):
    """Three factors, one in each colour channel of a flat 4x4 picture."""

    name, image_size, factor_names, factor_sizes = "pixels", 4, ("red", "green_hue", "blue"), (3, 2, 4)

    def images(self, indices):
        return np.broadcast_to(40 * self.factors(indices)[:, None, None], (len(indices), 4, 4, 3)).astype(np.uint8)


class Unlabelled(Dataset):
    name, image_size = "folder", 4

    def __len__(self):
        return 5

    def images(self, indices):
        return np.zeros((len(indices), 4, 4, 3), np.uint8)


def read_colours(images):
    return images.mean(dim=(2, 3)) * 3


def untrained(images):
    return torch.tanh(images.flatten(1) @ torch.randn(48, 4, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def results():
    both = {"trained": read_colours, "untrained": untrained}
    return {name: evaluate(encode, Pixels(), n_jobs=1, seed=3, **QUICK) for name, encode in both.items()}


def test_codes_are_in_file_order_whatever_the_batch():
    data, told = Pixels(), []
    codes = encode_dataset(read_colours, data, batch_size=7, progress=lambda *step: told.append(step))
    assert codes.dtype == np.float32
    np.testing.assert_allclose(codes, 3 * (40 * data.factors(np.arange(24)) / 127.5 - 1), atol=1e-5)
    np.testing.assert_array_equal(codes, encode_dataset(read_colours, data))
    assert told == [(7, 24), (14, 24), (21, 24), (24, 24)]


def test_identity_scores_one_and_beats_the_untrained(results):
    best, floor = results["trained"], results["untrained"]
    assert best["factor_vae"] == {"train_accuracy": 1.0, "eval_accuracy": 1.0, "num_active_dims": 3}
    assert best["dci"]["disentanglement"] > 0.99
    assert floor["dci"]["disentanglement"] < 0.8
    assert np.shape(floor["dci"]["importance"]) == (4, 3)


def test_result_says_what_it_was_measured_on(results):
    result = results["trained"]
    assert result["protocol"] == {
        "name": "custom",
        "seed": 3,
        "code": "scalars",
        "factor_vae_threshold": 0.05,
        **QUICK,
    }
    assert result["data"]["factor_sizes"] == [3, 2, 4]
    assert set(result["seconds"]) == {"encode", "factor_vae", "dci"}
    assert module._settings("paper", 1, {}) == module.Protocol(seed=1)

    class Brighter(Pixels):
        def images(self, indices):
            return super().images(indices) + np.uint8(1)

    assert describe(Brighter())["sha256"] != result["data"]["sha256"]
    assert describe(Pixels()) == result["data"]


def test_paper_protocol_is_named_so(monkeypatch):
    monkeypatch.setattr(module, "dci", lambda *parts, **kw: {"sizes": [len(p) for p in parts], "importance": parts[0]})
    monkeypatch.setattr(module, "factor_vae_score", lambda codes, sizes, **kw: kw)
    result = evaluate(read_colours, Pixels())
    assert result["protocol"]["name"] == "paper"
    assert result["dci"]["sizes"] == [10_000, 10_000, 5_000, 5_000]
    expected = dict(num_variance=10_000, num_train=10_000, num_eval=5_000, batch_size=64, threshold=0.05, seed=0)
    assert result["factor_vae"] == expected


def test_dci_samples_follow_the_published_stream(monkeypatch):
    """The golden arrays are 1,000 training and then 500 test samples of RandomState(0)."""

    class Grid(Pixels):
        factor_sizes = (6, 4, 5, 3)

    monkeypatch.setattr(module, "dci", lambda *parts, **kw: parts)
    settings = module.Protocol(dci_train=1_000, dci_test=500)
    _, train, _, test = module._dci(np.zeros((360, 2)), Grid(), settings, 1, None)
    golden = np.load(Path(__file__).parent / "golden/metrics.npz")
    np.testing.assert_array_equal(train, golden["mixed:factors_train"])
    np.testing.assert_array_equal(test, golden["mixed:factors_test"])


def test_table_shows_both_encoders(results):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(format_table(results))
    text = console.export_text()
    for expected in ("trained", "untrained", "FactorVAE score", "DCI disentanglement", "1.000", "custom, seed 3"):
        assert expected in text


def test_metrics_file_is_whole_or_absent(results, tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(path, results)
    assert json.loads(path.read_text()) == results
    with pytest.raises(InputError, match=r"metrics\.json.*NaN"):
        write_metrics(path, {"score": float("nan")})
    with pytest.raises(TypeError):
        write_metrics(path, {"score": object()})
    assert json.loads(path.read_text()) == results
    assert list(tmp_path.iterdir()) == [path]


def test_importance_picture(results, tmp_path):
    plot_importance(results["untrained"], tmp_path / "importance.png")
    width, height = Image.open(tmp_path / "importance.png").size
    assert width > 300 and height > 200
    assert [path.name for path in tmp_path.iterdir()] == ["importance.png"]


@pytest.mark.parametrize(
    "encode, data, options, names",
    [
        (read_colours, Unlabelled(), {}, "folder"),
        (read_colours, Pixels(), {"protocol": "best"}, "protocol"),
        (read_colours, Pixels(), {"votes": 3}, "votes"),
        (read_colours, Pixels(), {"dci_train": 0}, "dci_train"),
        (read_colours, Pixels(), {"seed": -1}, "seed"),
        (read_colours, Pixels(), {"batch_size": 0}, "pixels"),
        (lambda images: images.mean(dim=1), Pixels(), {}, "encode"),
        (lambda images: read_colours(images)[:-1], Pixels(), {}, "encode"),
        (lambda images: read_colours(images) * float("nan"), Pixels(), {}, "encode"),
        (lambda images: images.mean(), Pixels(), {}, "encode"),
    ],
)
def test_bad_input(encode, data, options, names):
    with pytest.raises(InputError, match=f"^{names}") as error:
        evaluate(encode, data, **options)
    assert "\n" not in str(error.value)


def test_incomplete_and_flat_grids_are_refused():
    class Incomplete(Pixels):
        def __len__(self):
            return 20

    class Flat(Pixels):
        factor_sizes = (3, 1, 4)

    with pytest.raises(InputError, match="20 images"):
        evaluate(read_colours, Incomplete())
    with pytest.raises(InputError, match="factor_sizes"):
        evaluate(read_colours, Flat())
