import json

import numpy as np
import pytest
from _codes import GRID, IDENTITY
from _tiny import TINY

from encdiff import EncDiff
from encdiff.data import open_dataset
from encdiff.errors import InputError
from encdiff.evaluation import encode_dataset, rank_models
from encdiff.metrics import udr

DATA = "procedural:2,2,2,2,2,2"


@pytest.fixture
def files(tmp_path, rng):
    """Codes of four models: three that agree, and one that is a rotation."""
    rotated = IDENTITY @ np.linalg.qr(rng.standard_normal((4, 4)))[0]
    models = [IDENTITY, -2 * IDENTITY[:, ::-1], IDENTITY[:, [1, 0, 3, 2]], rotated]
    for m, codes in enumerate(models):
        np.savez(tmp_path / f"{m}.npz", codes=codes, **({"factors": GRID} if m else {}))
    return [tmp_path / f"{m}.npz" for m in range(4)]


def test_files_of_codes_are_ranked(encdiff, files, tmp_path):
    code, text = encdiff("rank", files[3], *files[:3], "--out", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 0 and found["models"] == list(map(str, (files[3], *files[:3])))
    assert found["udr"][1:] == pytest.approx([1, 1, 1]) and found["udr"][0] < 0.7
    assert text.index("2.npz") < text.index("3.npz"), "the best first"
    assert found["images"] == 360 and found["data"] is None and found["num_active_dims"] == [4] * 4
    assert encdiff("rank", *files[:2], "--kind", "lasso", "--images", 50, "--out", tmp_path / "x.json")[0] == 0
    assert json.loads((tmp_path / "x.json").read_text())["images"] == 50


def test_models_are_ranked_by_their_codes(encdiff, model, tmp_path, seeds):
    other = EncDiff(TINY).eval()
    for name, each in (("a", model), ("b", other)):
        each.save_pretrained(tmp_path / name)
    data = open_dataset(DATA, TINY.image_size)
    codes = [encode_dataset(each.encode, data) for each in (model, other)]
    code, text = encdiff("rank", tmp_path / "a", tmp_path / "b", "--data", DATA, "--out", tmp_path / "udr.json")
    found = json.loads((tmp_path / "udr.json").read_text())
    assert code == 0 and found["data"]["images"] == 64, text
    np.testing.assert_allclose(found["pairwise"], udr(codes)["pairwise"], atol=1e-6)


def test_what_cannot_be_ranked(encdiff, files, model, tmp_path):
    assert encdiff("rank", files[0]) == (2, f"error: {files[0]}: must be two models or more, each named once")
    assert "each named once" in encdiff("rank", files[0], files[0])[1]
    np.savez(tmp_path / "few.npz", codes=IDENTITY[1:])
    np.savez(tmp_path / "none.npz", factors=GRID)
    for name, message in (("few", "has codes of 359 images and others of 360"), ("none", "codes are missing; must be")):
        code, text = encdiff("rank", files[0], tmp_path / f"{name}.npz", "--out", tmp_path / "no.json")
        assert code == 2 and f"{name}.npz: {message}" in text
    assert not (tmp_path / "no.json").exists()
    one, two = (open_dataset(grid, TINY.image_size) for grid in (DATA, "procedural:2,2,2,2,4,1"))
    with pytest.raises(InputError, match="^b: encodes other images than a; all must encode the same data$"):
        rank_models({"a": (model, one), "b": (model, two)})
