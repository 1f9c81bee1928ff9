"""Score another model's codes: how well do the principal components of pixels part the factors of a room?

    python examples/score_codes.py

A model is a function from images to codes (n, N), or a file of codes and factors. The table has one column for each:
PCA by its function, PCA from `codes.npz`, and the model `quickstart` of this package. 1 is best in every row. PCA mixes
factors in each of its codes; `quickstart` parts them, but takes several codes for one factor, which MIG counts against
it. `protocol` names the rows that a score has seen: "quick" is for a first look, the paper's figures are "paper".
"""

import numpy as np
import torch
from rich.console import Console
from sklearn.decomposition import PCA
from torch import Tensor

from encdiff import EncDiff, evaluate, open_dataset, to_float
from encdiff.evaluation import encode_dataset, evaluate_codes, format_table

METRICS = ("factor_vae", "mig", "modularity")  # of fifteen: docs/metrics.md

room = open_dataset("procedural:5,5,5,4,4,5", image_size=32)  # 10,000 images: every combination of six factors
rows = np.random.default_rng(0).choice(len(room), 1000, replace=False)
pca = PCA(n_components=10, random_state=0).fit(to_float(room.images(rows)).flatten(1).numpy())


def encode(images: Tensor) -> Tensor:
    """Codes (B, 10) of images float32 (B, 3, 32, 32) in [-1, 1]; any function of this form will do."""
    return torch.from_numpy(pca.transform(images.flatten(1).numpy()))


everything = np.arange(len(room))
np.savez(
    "codes.npz",  # what another program can write as well
    codes=encode_dataset(encode, room),
    factors=room.factors(everything),
    factor_names=np.array(room.factor_names),
)

results = {
    "PCA": evaluate(encode, room, metrics=METRICS, protocol="quick"),
    "PCA, from its file": evaluate_codes("codes.npz", metrics=METRICS),
    "quickstart": evaluate(EncDiff.from_pretrained("quickstart"), room, metrics=METRICS, protocol="quick"),
}
Console().print(format_table(results))
print("codes.npz can be scored without Python, too: encdiff evaluate codes.npz")
