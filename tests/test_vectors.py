from dataclasses import replace

import numpy as np
import torch
from _tiny import TINY
from sklearn.decomposition import PCA

from encdiff import EncDiff
from encdiff.data import open_dataset, to_float
from encdiff.evaluation.vectors import FirstComponents, as_scalars


def test_each_concept_is_its_first_principal_component():
    model, data = EncDiff(replace(TINY, concept_width=4)).eval(), open_dataset("procedural:3,3,3,2,2,3", 16)
    scored = as_scalars(model, data)
    assert isinstance(scored, FirstComponents) and next(scored.parameters()) is next(model.parameters())
    with torch.no_grad():
        images = to_float(data.images(range(len(data))))  # more than are encoded at once
        vectors, found = model.encode(images).numpy(), scored.encode(images).numpy()
    assert len(data) == 324 and found.shape == (324, 3)
    for concept in range(3):
        theirs = PCA(1).fit_transform(vectors[:, concept].astype(np.float64))[:, 0]
        ours = found[:, concept]
        np.testing.assert_allclose(ours, theirs * np.sign(theirs @ ours), atol=1e-4 * theirs.std())
        assert theirs.std() > 0


def test_scalars_are_left_as_they_are():
    model = EncDiff(TINY).eval()
    assert as_scalars(model, open_dataset("procedural:2,1,1,1,1,1", 16)) is model
