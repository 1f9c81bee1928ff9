"""`python -m bench.gpu.curves FOLDER`: paper.png of a training's paper.json and scores.

Loss and scores against seconds of training, and which scalar tells which factor at the end.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np

from encdiff.data.procedural import FACTOR_NAMES

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def scores_of(folder: Path) -> dict[str, dict]:
    """Seconds of training, or "final" -> scores: of scores.json, or of the files that the block `paper` leaves."""
    if (folder / "scores.json").exists():
        return json.loads((folder / "scores.json").read_text())
    found = {path.stem.removeprefix("scores-"): json.loads(path.read_text()) for path in folder.glob("scores-*.json")}
    return dict(sorted(found.items(), key=lambda item: (item[0] == "final", item[0].zfill(9))))


def draw(folder: Path) -> Path:
    found, scores = json.loads((folder / "paper.json").read_text()), scores_of(folder)
    seconds, loss = np.array(found["log"])[:, 1], np.array(found["log"])[:, 2]
    at = {float(name) if name != "final" else found["seconds"]: s for name, s in scores.items()}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    left.semilogy(seconds, loss, lw=0.8)
    left.set(xlabel="seconds of training", ylabel="loss")
    middle.plot(list(at), [s["factor_vae"]["eval_accuracy"] for s in at.values()], "o-", label="FactorVAE score")
    for score in ("disentanglement", "completeness"):
        middle.plot(list(at), [s["dci"][score] for s in at.values()], "o-", label=f"DCI {score}")
    middle.set(xlabel="seconds of training", ylim=(0, 1.02))
    middle.legend(loc="lower right")
    importance = np.array(list(scores.values())[-1]["dci"]["importance"])
    order = np.lexsort((-importance.max(1), importance.argmax(1)))
    image = right.imshow(importance[order].T, aspect="auto", cmap="Blues", vmin=0)
    right.set(xlabel="scalar, by the factor that it tells", xticks=range(len(order)), yticks=range(len(FACTOR_NAMES)))
    right.set_xticklabels(order, fontsize=7)
    right.set_yticklabels([name.replace("_", " ") for name in FACTOR_NAMES])
    figure.colorbar(image, label="importance")
    figure.savefig(folder / "paper.png", dpi=90)
    plt.close(figure)
    return folder / "paper.png"


if __name__ == "__main__":
    print(draw(Path(sys.argv[1])))
