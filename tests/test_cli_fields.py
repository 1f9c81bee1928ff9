"""`encdiff fields render` and `info`: what they print and write."""

import numpy as np
import pytest
from typer.testing import CliRunner

from encdiff.cli.fields import fields_app
from encdiff.data import describe
from encdiff.errors import InputError
from encdiff.fields.equations import samples
from encdiff.fields.formats import open_fields
from encdiff.fields.vorticity import Vorticity


def call(*args):
    result = CliRunner().invoke(fields_app, list(map(str, args)), catch_exceptions=False)
    return result.exit_code, result.output


def test_render_and_info(tmp_path):
    path = tmp_path / "darcy.h5"
    code, text = call("render", path, "--kind", "darcy", "--size", 8, "--count", 6, "--seed", 2, "--processes", 1)
    assert code == 0 and f"6 samples: {path}" in text
    code, text = call("info", path)
    fields, rows = open_fields(path).read(np.arange(6)), [line.split() for line in text.splitlines()]
    assert code == 0 and "darcy.h5: 6 samples of 8x8" in text and "domain: x 0 to 1, y 0 to 1\n" in text
    mean, std = fields[:, 1].astype(float).mean(), fields[:, 1].astype(float).std()
    least, greatest = fields[:, 1].min(), fields[:, 1].max()
    assert ["pressure", *(f"{value:.4g}" for value in (mean, std, least, greatest))] in rows
    assert describe(open_fields(path))["sha256"] in text and "drawn at random" not in text


def test_options_of_the_flow(tmp_path):
    options = {"frames": 3, "duration": 0.5, "viscosity": 0.01, "strength": 2.0}
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    path = tmp_path / "flow.h5"
    call("render", path, "--kind", "vorticity", "--size", 8, "--count", 2, "--processes", 1, *given)
    np.testing.assert_array_equal(open_fields(path).read([0, 1]), samples(Vorticity(8, **options), 0, 0, 2))
    text = call("info", path)[1]
    assert "2 samples of 3 frames of 8x8" in text and ", periodic" in text and "times: 0 to 0.5" in text


def test_ranges_of_a_part_of_the_samples_are_said_to_be_so(tmp_path, monkeypatch):
    np.save(tmp_path / "x.npy", np.zeros((2001, 1, 1, 1)))
    assert "over 2,000 samples, drawn at random" in call("info", tmp_path / "x.npy")[1]


def test_refusals(tmp_path):
    (tmp_path / "x.h5").write_text("mine")
    with pytest.raises(InputError, match="exists already; use --overwrite"):
        call("render", tmp_path / "x.h5")
    with pytest.raises(InputError, match="must end in .h5"):
        call("render", tmp_path / "x.npy")
    with pytest.raises(InputError, match="frames is no setting of darcy"):
        call("render", tmp_path / "y.h5", "--frames", 3)
    with pytest.raises(InputError, match="nowhere"):
        call("info", "nowhere")
    assert call("render", tmp_path / "y.h5", "--kind", "heat")[0] == 2
    assert (tmp_path / "x.h5").read_text() == "mine" and not (tmp_path / "y.h5").exists()
