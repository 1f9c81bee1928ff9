"""What a type checker makes of the public names: checked by `make lint`, never run."""

from typing import Any, assert_type

from torch import Tensor

import encdiff
from encdiff import EncDiff, SamplingEngine, TrainConfig, ops
from encdiff.data import Dataset
from encdiff.evaluation import Direction, fit_direction
from encdiff.prior import MixturePrior, Prior, fit_prior, load_prior


def of_models(images: Tensor) -> None:
    model = EncDiff.from_pretrained("room64", device="cpu")
    assert_type(model, EncDiff)
    assert_type(model.eval(), EncDiff)
    assert_type(model.encode(images), Tensor)
    assert_type(model.swap(images, images, [0, 3]), Tensor)
    assert_type(model.interpolate(images[0], images[1], 7, concepts=[0, 3]), Tensor)
    found = fit_direction(images.flatten(1), [0, 1])
    assert_type(found, Direction)
    assert_type(model.edit(images, found, strength=2.0), Tensor)
    assert_type(SamplingEngine(model, precision="bf16", steps=20)(images), Tensor)


def of_priors(model: EncDiff, codes: Tensor) -> None:
    prior = fit_prior(codes, "mixture", components=3)
    assert_type(prior, Prior)
    assert_type(prior.sample(16, seed=1), Tensor)
    assert_type(model.sample_prior(16, prior, steps=20), Tensor)
    assert_type(load_prior(MixturePrior.fit(codes).save("prior")), Prior)


def of_runs(model: EncDiff, data: Dataset) -> None:
    assert_type(encdiff.open_dataset("procedural", 64), Dataset)
    assert_type(encdiff.to_float(data.images([0, 1])), Tensor)
    assert_type(encdiff.train(model, data, "runs/a", TrainConfig.from_preset("quickstart", steps=3)), EncDiff)
    assert_type(encdiff.evaluate(model, data, metrics=["dci"]), dict[Any, Any])


def of_ops(x: Tensor, context: Tensor, w: Tensor) -> None:
    assert_type(ops.cross_attention(x, context, w, w, w, w, heads=8), Tensor)
    assert_type(ops.cross_attention(x, context, w, w, w, w, heads=8, maps="mean"), tuple[Tensor, Tensor])
    assert_type(ops.group_norm(x, w, w, 8, silu=True), Tensor)
    assert_type(ops.group_norm(x, w, w, 8, with_input=True), tuple[Tensor, Tensor])
