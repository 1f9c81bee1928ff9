"""The examples run as they are printed, and leave what they say."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
FEW = ("targets=pictures[2:])", "targets=pictures[2:], steps=2)")
PATHS = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])


def run(name: str, folder: Path, *arguments: str, steps: tuple[str, str] = ("", "")) -> str:
    """What it prints; with other `steps` of sampling than are printed there, which would take most of the time."""
    script = folder / f"{name}.py"
    script.write_text((EXAMPLES / script.name).read_text("utf-8").replace(*steps), "utf-8")
    command = [sys.executable, str(script), *arguments]
    environment = os.environ | {"PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def colours(path: Path) -> int:
    with Image.open(path) as picture:
        return len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.slow
def test_own_images(tmp_path):
    said = run("own_images", tmp_path, steps=FEW)
    assert "500 pictures, 150 steps of 64" in said and colours(tmp_path / "swap.png") > 1000
    with open(tmp_path / "runs/own_images/log.csv") as log:
        losses = [float(row["loss"]) for row in csv.DictReader(log)]
    assert losses[-1] < 0.6 * losses[0]  # as its docstring says, it falls


def test_own_images_of_a_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(256, size=(40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"photos/{i}.jpg")
    assert "8 pictures, 2 steps" in run("own_images", tmp_path, "photos", "--steps", "2", steps=FEW)
    assert colours(tmp_path / "swap.png") > 1000 and not (tmp_path / "images").exists()


@pytest.mark.slow
def test_score_codes(tmp_path):
    from encdiff.evaluation import evaluate_codes

    said = run("score_codes", tmp_path)
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in said.splitlines() if line.startswith("│")}
    pca, filed, trained = map(float, rows["FactorVAE score"])
    assert 0.3 < pca < 0.9 and trained > 0.99  # what it shows: the encoder parts what PCA does not
    again = evaluate_codes(tmp_path / "codes.npz", metrics=("factor_vae",))
    assert round(again["factor_vae"]["eval_accuracy"], 3) == filed


def test_op_in_module(tmp_path):
    said = run("op_in_module", tmp_path)
    assert len(re.findall(r"^cross_attention: \w+: chosen$", said, re.M)) == 1
    distances = [float(line.rsplit(" ", 1)[1]) for line in said.splitlines() if line.startswith("from PyTorch's ops")]
    assert len(distances) == 2 and all(0 < d < 3e-6 for d in distances)


@pytest.mark.slow
def test_own_sampler(tmp_path):
    said = run("own_sampler", tmp_path)
    shares = re.findall(r"^([\w+-]+).*in a blob +([\d.]+)% +rarest blob +([\d.]+)%$", said, re.M)
    within = {name: float(share) for name, share, _ in shares}
    assert within.keys() == {"true", "DDPM", "DDIM", "DPM-Solver++"}
    assert 98 < within["true"] < 100 and min(within.values()) > 85  # of a ring that is blurred into one, about 75
    assert all(float(rarest) > 8 for *_, rarest in shares)
    assert colours(tmp_path / "ring.png") > 2


@pytest.mark.slow
def test_tour(tmp_path):
    said = run("tour", tmp_path, steps=("steps=10", "steps=2"))
    assert "FactorVAE score 1.000" in said and "scale: concepts [4]" in said
    for name in ("swap", "traverse", "attend"):
        assert colours(tmp_path / f"tour-{name}.png") > 1000


def test_the_notebook_is_what_the_script_gives():
    jupytext = pytest.importorskip("jupytext", reason="jupytext is in the extra dev")
    script, notebook = (jupytext.read(EXAMPLES / f"tour.{suffix}") for suffix in ("py", "ipynb"))
    wanted, held = ([(cell.cell_type, cell.source) for cell in book.cells] for book in (script, notebook))
    assert held == wanted, "make notebook"
    assert not [cell for cell in notebook.cells if cell.get("outputs")], "the notebook is kept without outputs"


def test_the_table_lists_every_example():
    listed = re.findall(r"^\| `python examples/(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(path.stem for path in EXAMPLES.glob("*.py"))
