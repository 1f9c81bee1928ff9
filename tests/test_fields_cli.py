"""`encdiff fields train`, `reconstruct`, `evaluate` and `demo`: what they write, print and refuse."""

import json
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from _fields import CONFIG, field_model
from PIL import Image

from encdiff import pretrained
from encdiff.cli import app
from encdiff.fields import FieldModel, demo, open_fields, read_sensors, recipes, render
from encdiff.fields.darcy import Darcy
from encdiff.fields.equations import samples
from encdiff.files.reading import read_json

SMALL = replace(
    CONFIG, channels=("permeability", "pressure"), mean=(7.5, 0.01), std=(4.5, 0.005), height=16, width=16
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """20 small flows, of which runs hold out 4."""
    path = tmp_path_factory.mktemp("data") / "darcy.h5"
    render(path, "darcy", 16, 20, processes=1)
    return path


@pytest.fixture(scope="module")
def presets():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.FIELD_PRESETS, "small", CONFIG)
        yield


@pytest.fixture(scope="module")
def run(data, presets, tmp_path_factory):
    """A run of two steps, by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "darcy"
    with pytest.MonkeyPatch.context() as patch:
        options = ["--data", data, "--run", folder, "--steps", 2, "--batch-size", 2, "--observed", "0.02,0.1"]
        patch.setattr(sys, "argv", ["encdiff", "fields", "train", *map(str, options)])
        with pytest.raises(SystemExit):
            app.main()
    return folder


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "wells.csv"
    path.write_text("x,y,pressure,sigma\n0.2,0.3,0.011,0\n0.7,0.8,0.006,0.001\n")
    return path


def test_help_does_not_load_torch():
    code = """
import sys
from encdiff.cli import app as cli
for command in ("train", "reconstruct", "evaluate", "demo"):
    sys.argv = ["encdiff", "fields", command, "--help"]
    try:
        cli.main()
    except SystemExit:
        pass
print([name for name in ("torch", "scipy", "h5py", "matplotlib") if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("[]\n")


def test_train(run, data):
    begun = read_json(run / "config.json")
    assert begun["training"]["steps"] == 2 and begun["training"]["observed"] == [0.02, 0.1]
    assert begun["model"]["objective"] == "diffusion" and begun["data"] == str(data.resolve())
    assert begun["fingerprint"]["images"] == 16
    config = FieldModel.from_pretrained(run / "model").config
    np.testing.assert_allclose(config.mean, open_fields(f"{data}:0:16").statistics()[0])


def test_resume_and_other_methods(encdiff, run, data, presets, tmp_path):
    code, text = encdiff("fields", "train", "--run", run, "--resume")
    assert code == 0 and "is at its last step already" in text
    options = ["--data", data, "--method", "voronoi", "--steps", 1, "--batch-size", 1, "--run", tmp_path / "voronoi"]
    assert encdiff("fields", "train", *options)[0] == 0
    config = FieldModel.from_pretrained(tmp_path / "voronoi" / "model").config
    assert (config.objective, config.condition) == ("regression", "input")
    code, text = encdiff("fields", "train", "--run", run, "--resume", "--method", "voronoi")
    assert code == 2 and "error: --method and --preset cannot be given with --resume" in text


def test_reconstruct(encdiff, run, table, tmp_path):
    code, text = encdiff("fields", "reconstruct", run, table, "--ensemble", 3, "--steps", 2)
    assert code == 0 and "wells-fields.npz" in text and "wells-fields.png" in text
    with np.load(tmp_path / "wells-fields.npz") as found:
        assert found["members"].shape == (3, 2, 16, 16) and found["mean"].shape == found["spread"].shape == (2, 16, 16)
        assert found["channels"].tolist() == ["permeability", "pressure"] and found["domain"].tolist() == [0, 1, 0, 1]
        assert found["members"][:, 1, 4, 3] == pytest.approx(0.011)  # the exact one, in its pixel
        members = found["members"]
    assert Image.open(tmp_path / "wells-fields.png").width > 500
    out = ["--out", tmp_path / "a.h5", "--picture", tmp_path / "b.png", "--ensemble", 3, "--steps", 2]
    (tmp_path / "later.csv").write_text("x,y,pressure\n0.5,0.5,0.02\n")
    assert encdiff("fields", "reconstruct", run / "model", table, *out, "--more", tmp_path / "later.csv")[0] == 0
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["members"].shape == members.shape and (tmp_path / "b.png").is_file()
        assert file["mean"][1, 8, 8] == pytest.approx(0.02, abs=1e-3) and members[:, 1, 8, 8].mean() != 0.02


def test_evaluate(encdiff, run, data, tmp_path):
    options = ["--count", 2, "--ensemble", 3, "--steps", 2, "--observed", "0.05", "--noise", "0,0.1"]
    code, text = encdiff("fields", "evaluate", run, *options, "--baselines", "nearest,linear")
    assert code == 0 and "darcy 5 % 0 %" in text and "linear 5 % 10 %" in text
    result = json.loads((run / "fields" / "fields.json").read_text())
    assert {row["method"] for row in result["rows"]} == {"darcy", "nearest", "linear"} and len(result["rows"]) == 6
    assert Image.open(run / "fields" / "errors.png").width > 300
    out = ["--out", tmp_path / "out", "--data", data, "--baselines", "none", *options]
    assert encdiff("fields", "evaluate", run / "model", "--beside", run, *out)[0] == 0
    rows = json.loads((tmp_path / "out" / "fields.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["model", "darcy"] * 2
    assert rows[0]["nrmse"] == rows[1]["nrmse"] == result["rows"][0]["nrmse"]  # one and the same model


def test_a_table_grows(encdiff, run, data, tmp_path, monkeypatch):
    first = ["--count", 2, "--observed", "0.05", "--noise", "0", "--out", tmp_path]
    more = ["--ensemble", 2, "--steps", 1, *first]
    assert encdiff("fields", "evaluate", run, *more, "--baselines", "nearest")[0] == 0
    assert encdiff("fields", "evaluate", run, *more, "--baselines", "linear", "--add")[0] == 0
    rows = json.loads((tmp_path / "fields.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["nearest", "darcy", "linear"]
    monkeypatch.setattr(FieldModel, "members", None)  # nothing is drawn
    code, text = encdiff("fields", "evaluate", run, *more, "--add", "--seed", 1)
    assert code == 2 and "fields.json: was made with protocol" in text and "use another folder" in text


def test_fields_that_were_trained_on_are_not_scored(encdiff, run, data, tmp_path):
    for given in ([], ["--data", data]):
        code, text = encdiff("fields", "evaluate", run, "--count", 5, *given)
        assert code == 2 and "--count is 5, must be at most 4: darcy was trained on the other fields" in text
    for part, most in (("0:12", 0), ("1:20", 4), ("1:16", 0), ("0:18", 2)):
        code, text = encdiff("fields", "evaluate", run / "model", "--count", 5, "--data", f"{data}:{part}")
        said = f"--count is 5, must be at most {most}: model was trained" if most else "model was trained on all of it"
        assert code == 2 and said in text
    render(tmp_path / "other.h5", "darcy", 16, 5, seed=1, processes=1)
    options = ["--count", 5, "--ensemble", 1, "--steps", 1, "--observed", 0.05, "--noise", 0, "--baselines", "none"]
    out = ["--data", tmp_path / "other.h5", "--out", tmp_path / "out"]
    assert encdiff("fields", "evaluate", run, *options, *out)[0] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--run", "x"], "error: --data is missing: A file or folder of fields"),
        (["train", "--run", "x", "--data", "nowhere.h5"], "error: data 'nowhere.h5': not found here"),
        (["train", "--run", "x", "--data", "DATA", "--observed", "0.1"], "--observed '0.1' must be two shares"),
        (["train", "--run", "x", "--data", "DATA", "--observed", "nan,1"], "observed is (nan, 1.0), must be"),
        (["train", "--run", "x", "--data", "DATA", "--observed", "0.2,0.1"], "observed is (0.2, 0.1), must be the"),
        (["train", "--run", "x", "--data", "DATA", "--noise", "nan"], "Invalid value for '--noise'"),
        (["train", "--run", "x", "--data", "DATA", "--noise", "-1"], "Invalid value for '--noise'"),
        (["train", "--run", "x", "--data", "DATA", "--exact", "2"], "exact is 2.0, must be a number in 0..1"),
        (["evaluate", "RUN", "--observed", "0,0.1"], "--observed '0,0.1' must be shares above 0"),
        (["evaluate", "RUN", "--observed", "0.1;0.2"], "--observed '0.1;0.2' must be shares"),
        (["evaluate", "RUN", "--observed", "nan"], "--observed 'nan' must be shares"),
        (["evaluate", "RUN", "--noise", "-0.1"], "--noise '-0.1' must be numbers of 0 or more"),
        (["evaluate", "RUN", "--noise", "inf"], "--noise 'inf' must be numbers of 0 or more"),
        (["evaluate", "RUN", "--baselines", "spline"], "--baselines: 'spline' is unknown, must be among nearest"),
        (["evaluate", "RUN", "--beside", "RUN"], "--beside: two rows would be called darcy"),
        (["evaluate", "RUN/model"], "--count is 32, must be at most 4: model was"),
        (["evaluate", "nowhere"], "nowhere: no such folder; must be a run, a folder that save_pretrained wrote"),
        (["reconstruct", "RUN", "CSV", "--out", "x.txt"], "x.txt: must end in .npz or .h5"),
        (["reconstruct", "RUN", "CSV", "--picture", "a.pdf"], "a.pdf: must end in .png: it becomes a PNG picture"),
        (["reconstruct", "RUN", "nowhere.csv"], "error: nowhere.csv: no such file"),
        (["reconstruct", "RUN", "CSV", "--time", "1"], "wells.csv has no column t"),
        (["reconstruct", "RUN", "CSV", "--localisation", "1"], "--localisation is given without --more"),
        (["reconstruct", "RUN", "CSV", "--more", "CSV", "--localisation", "nan"], "--localisation is nan, must be"),
        (["reconstruct", "RUN", "CSV", "--more", "CSV", "--ensemble", "1"], "--more needs an ensemble of at least 2"),
        (["reconstruct", "quickstart", "CSV"], "is of no model of fields; `encdiff fields train` makes one"),
        (["demo", "--run", "out", "--observed", "nan"], "observed is nan, must be a share"),
        (["demo", "--run", "out", "--noise", "nan"], "noise is nan, must be 0 or more"),
    ],
)
def test_refusals(encdiff, run, data, table, tmp_path, monkeypatch, presets, words, message):
    field_model(SMALL).save_pretrained(tmp_path / "packaged")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", str(tmp_path / "packaged"))
    given = {"DATA": data, "RUN": run, "CSV": table, "RUN/model": run / "model"}
    code, text = encdiff("fields", *(given.get(word, word) for word in words))
    assert code == 2 and message in text and "Traceback" not in text
    assert not (tmp_path / "x").exists() and not (tmp_path / "out" / "field-1.png").exists()


def test_other_commands_say_that_a_model_is_of_fields(encdiff, run):
    for command in ("swap", "traverse", "evaluate"):
        code, text = encdiff(command, run)
        assert code == 2 and "is of a model of fields, must be of an EncDiff; `encdiff fields`" in text, command


def test_demo(encdiff, tmp_path, monkeypatch):
    field_model(SMALL).save_pretrained(tmp_path / "packaged")
    monkeypatch.setattr(demo, "MODEL", str(tmp_path / "packaged"))
    monkeypatch.setattr(demo, "COUNT", 2)
    code, text = encdiff("fields", "demo", "--run", tmp_path / "shown", "--observed", 0.05, "--noise", 0.1)
    assert code == 0 and "2 new flows, 13 sensors each" in text
    for method in (str(tmp_path / "packaged"), "nearest", "kriging"):
        assert method in text
    for i in (1, 2):
        assert Image.open(tmp_path / "shown" / f"field-{i}.png").width > 700
        sensors = read_sensors(tmp_path / "shown" / f"sensors-{i}.csv", SMALL.grid)
        assert len(sensors) == 13 and sensors.sigma[0] == pytest.approx(0.1 * np.array(SMALL.std))


def test_the_packaged_models_are_told_apart(monkeypatch, tmp_path):
    assert pretrained.names() == ["quickstart", "room32", "room64"] and pretrained.names("fields") == ["darcy64"]
    field_model().save_pretrained(tmp_path / "darcy")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    assert pretrained.names() == [] and pretrained.names("fields") == ["darcy"]


def test_the_demonstrations_flows_are_new():
    """Seeds of a training's data are small numbers."""
    theirs, ours = samples(Darcy(8), 0, 0, 3), samples(Darcy(8), demo.SEED, 0, 3)
    assert not any(np.array_equal(a, b) for a in theirs for b in ours)
