import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from _tiny import TINY
from PIL import Image
from rich.console import Console

from encdiff import EncDiff, open_dataset
from encdiff.data import Dataset, describe
from encdiff.errors import InputError
from encdiff.evaluation import encode_dataset, evaluate, evaluate_codes, format_table, plot_importance, write_metrics
from encdiff.evaluation.vectors import as_scalars

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
        "subset": "all",
        "factor_vae_threshold": 0.05,
        **{"beta_vae_train": 10_000, "beta_vae_eval": 5_000, "beta_vae_batch": 64},
        **QUICK,
    }
    assert result["data"]["factor_sizes"] == [3, 2, 4]
    assert set(result["seconds"]) == {"encode", "score"}

    class Brighter(Pixels):
        def images(self, indices):
            return super().images(indices) + np.uint8(1)

    assert describe(Brighter())["sha256"] != result["data"]["sha256"]
    assert describe(Pixels()) == result["data"]


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

    with pytest.raises(InputError, match="there are 20 images"):
        evaluate(read_colours, Incomplete())
    with pytest.raises(InputError, match="factor_sizes"):
        evaluate(read_colours, Flat())


def test_held_out_rows_are_scored_by_what_the_others_taught():
    class Many(Pixels):
        factor_sizes = (6, 5, 7)

    result = evaluate(read_colours, Many(), protocol="heldout", metrics=("factor_vae", "dci", "mig"), n_jobs=1)
    assert result["protocol"]["name"] == "heldout" and result["protocol"]["subset"] == "80/20"
    assert result["factor_vae"]["eval_accuracy"] == 1 and result["dci"]["disentanglement"] > 0.99
    assert result["mig"]["mig"] > 0.9


@pytest.fixture
def codes_file(tmp_path):
    factors = np.stack(np.unravel_index(np.arange(210), (6, 5, 7)), axis=1)
    codes = factors @ np.diag([1.0, -2.0, 0.5]) + 0.01 * np.random.default_rng(0).normal(size=(210, 3))
    path = tmp_path / "codes.npz"
    np.savez(path, codes=codes, factors=factors, factor_names=["a", "b", "c"])
    return path


def test_codes_of_any_model(codes_file):
    result = evaluate_codes(codes_file, metrics=("factor_vae", "dci", "sap"), seeds=3, n_jobs=1, **QUICK)
    assert result["data"]["rows"] == 210 and result["data"]["factor_names"] == ["a", "b", "c"]
    assert result["dci"]["disentanglement"] > 0.95 and result["factor_vae"]["eval_accuracy"] > 0.95
    summary = result["summary"]
    assert summary["seeds"] == 3 and len(summary["dci"]["values"]) == 3
    assert summary["dci"]["values"][0] == result["dci"]["disentanglement"]
    assert summary["dci"]["mean"] == pytest.approx(np.mean(summary["dci"]["values"]))
    low, high = summary["dci"]["interval"]
    assert min(summary["dci"]["values"]) - 1e-9 <= low <= summary["dci"]["mean"] <= high
    json.dumps(result, allow_nan=False)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(format_table({"other": result}))
    text = console.export_text()
    assert "+-" in text and "seeds 0 to 2" in text and "codes.npz" in text


def test_every_score_of_several_seeds_is_their_mean(codes_file, monkeypatch, tmp_path):
    """Also those beside the headline, and the picture says whose importance it shows."""
    metrics = ("factor_vae", "dci", "infomec")
    options = dict(metrics=metrics, n_jobs=1, **QUICK)
    result = evaluate_codes(codes_file, seeds=3, **options)
    alone = [evaluate_codes(codes_file, seed=seed, **options) for seed in range(3)]
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(format_table({"other": result}))
    text = console.export_text()
    rows = {"DCI completeness": ("dci", "completeness"), "DCI informativeness": ("dci", "informativeness_test")}
    rows |= {"InfoC": ("infomec", "infoc"), "InfoE": ("infomec", "infoe")}
    rows |= {"active dimensions": ("factor_vae", "num_active_dims")}
    for title, (metric, field) in rows.items():
        values = [one[metric][field] for one in alone]
        assert result["summary"][metric]["further"][field]["values"] == values
        line = next(line for line in text.splitlines() if title in line)
        assert f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}" in line
    assert len(set(result["summary"]["dci"]["further"]["completeness"]["values"])) > 1
    titles = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_title", lambda self, title: titles.append(title))
    for scores in (result, alone[1]):
        plot_importance(scores, tmp_path / "importance.png")
    assert titles[0].endswith("seed 0 alone)") and "seed" not in titles[1]


def test_what_is_no_zip_file(tmp_path):
    (tmp_path / "codes.npz").write_text("codes")
    with pytest.raises(InputError, match=r"codes.npz: not an .npz of arrays \(no zip file\)"):
        evaluate_codes(tmp_path / "codes.npz")


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"codes": np.zeros((4, 2))}, "has no array 'factors'"),
        ({"codes": np.zeros((4, 2)), "factors": np.zeros((3, 2), int)}, r"codes are \(4, 2\) and factors \(3, 2\)"),
        ({"codes": np.array([{}, {}]), "factors": np.zeros((2, 2), int)}, "not an .npz of arrays"),
        ({"codes": np.zeros((4, 2)), "factors": np.zeros((4, 2), int), "factor_names": ["a"]}, "1 factor_names for 2"),
        ({"codes": np.zeros((4, 2)), "factors": np.zeros((4, 2), int)}, "factors: factor 0 is constant"),
    ],
    ids=["absent", "lengths", "pickled", "names", "constant"],
)
def test_bad_files_of_codes(tmp_path, arrays, message):
    path = tmp_path / "codes.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match=message):
        evaluate_codes(path)


@pytest.mark.parametrize("width", [1, 2])
def test_a_model_is_asked_in_eval_mode_and_left_as_it_was(width):
    """In training mode a batch norm would make a code depend on its batch."""
    data = open_dataset("procedural:3,2,2,2,2,2", 16)
    model = EncDiff(replace(TINY, concept_width=width))
    options = {"metrics": ["dci"], "n_jobs": 1, "dci_train": 80, "dci_test": 40}
    encode = as_scalars(model.eval(), data).encode
    expected = evaluate(lambda images: encode(images), data, **options)
    found = evaluate(model.train(), data, **options, batch_size=5)
    assert model.training and found["dci"] == expected["dci"]
    assert ("principal" in found["protocol"]["code"]) == (width > 1)
