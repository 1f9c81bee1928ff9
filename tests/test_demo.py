import json
from functools import partial

import pytest

from encdiff import pictures
from encdiff.errors import InputError
from encdiff.experiments.demo import demo


def test_the_whole_way(tmp_path, capsys, monkeypatch):
    for drawing in (pictures.swap_grid, pictures.factor_traversal, pictures.attention_picture):
        name = f"encdiff.experiments.demo.{drawing.__name__}"
        monkeypatch.setattr(name, partial(drawing, steps=2))  # in place of 20
    run = tmp_path / "runs" / "demo"
    options = dict(data="procedural:2,2,2,2,2,2", protocol="quick", steps=2, batch_size=8)
    (run / "pictures").mkdir(parents=True)
    for earlier in ("../demo.h5", "config.json", "checkpoint.safetensors", "pictures/earlier.png"):
        (run / earlier).write_text("replaced")
    results = demo(run, 0, "cpu", **options)
    assert results.keys() == {"trained", "untrained"}
    assert json.loads((run / "metrics.json").read_text())["untrained"] == results["untrained"]
    assert results["untrained"]["factor_vae"]["num_active_dims"] == 40
    for name in ("pictures/swap.png", "pictures/traverse.png", "pictures/attend.png", "importance.png"):
        assert (run / name).is_file()
    said = "".join(capsys.readouterr().out.split())
    assert all(name in said for name in ("swap.png", "traverse.png", "attend.png", "importance.png", "FactorVAEscore"))
    assert not (run / "pictures/earlier.png").exists() and "replaced" not in (run / "config.json").read_text()
    (run / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="will not overwrite a folder that also holds thesis.tex"):
        demo(run, 0, "cpu")
