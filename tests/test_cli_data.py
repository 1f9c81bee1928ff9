"""`encdiff data ...`: what it prints and writes."""

import numpy as np
import pytest
from typer.testing import CliRunner

from encdiff.cli.data import data_app
from encdiff.data import describe, open_dataset
from encdiff.errors import InputError


def call(*args):
    result = CliRunner().invoke(data_app, list(map(str, args)), catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize("kind, spec", [("room", "procedural:2,1,1,2,2,1"), ("sprites", "sprites:3,2,2,2,2")])
def test_render_writes_what_the_spec_renders(tmp_path, kind, spec):
    code, text = call("render", tmp_path / "x.h5", "--kind", kind, "--image-size", 16, "--grid", spec.split(":")[1])
    rendered, written = open_dataset(spec, 16), open_dataset(tmp_path / "x.h5")
    assert code == 0 and f"{len(rendered)} images" in text
    assert written.factor_names == rendered.factor_names and written.factor_sizes == rendered.factor_sizes
    everything = np.arange(len(rendered))
    np.testing.assert_array_equal(written.images(everything), rendered.images(everything))
    np.testing.assert_array_equal(written.labels(everything), rendered.labels(everything))


def test_convert_takes_a_part(tmp_path):
    call("render", tmp_path / "a.h5", "--kind", "sprites", "--image-size", 16, "--grid", "3,2,2,2,2")
    assert call("convert", f"{tmp_path / 'a.h5'}:1,2,2,1,1", tmp_path / "b.h5", "--image-size", 8)[0] == 0
    assert open_dataset(tmp_path / "b.h5").factor_sizes == (1, 2, 2, 1, 1)


def test_info(tmp_path):
    code, text = call("info", "sprites:3,2,4,2,2", "--image-size", 16)
    found = describe(open_dataset("sprites:3,2,4,2,2", 16))
    assert code == 0 and "sprites: 96 images of 16x16" in text and found["sha256"] in text
    rows = [line.split() for line in text.splitlines()]
    assert ["scale", "2", "0.5", "1"] in rows and ["orientation", "4", "0", "4.71239"] in rows


def test_info_of_a_folder(tmp_path):
    from PIL import Image

    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    code, text = call("info", tmp_path, "--image-size", 8)
    assert code == 0 and "1 images of 8x8" in text and "no labels" in text


def test_refusals(tmp_path):
    (tmp_path / "x.h5").write_text("mine")
    with pytest.raises(InputError, match="exists already; use --overwrite"):
        call("render", tmp_path / "x.h5")
    with pytest.raises(InputError, match="nowhere"):
        call("info", "nowhere")
    assert call("render", tmp_path / "y.h5", "--kind", "cube")[0] == 2
    assert (tmp_path / "x.h5").read_text() == "mine" and not (tmp_path / "y.h5").exists()
