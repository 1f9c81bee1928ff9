import pytest
import torch
from _golden import draw, fill, load, relative_error
from torch import nn

from encdiff.errors import InputError
from encdiff.models.encoder import ImageEncoder
from encdiff.models.tokens import MLPBank


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_published_scalars(mode):
    encoder = fill(ImageEncoder(), "cond_stage_model.encoder.").train(mode == "train")
    golden = load("encoder_paper" if mode == "eval" else "encoder_paper_train")
    scalars = encoder(draw("encoder:image", (4, 3, 64, 64)).tanh())
    assert relative_error(scalars, golden["scalars"]) < 1e-4


def test_published_tokens():
    golden = load("encoder_paper")
    encoder, bank = fill(ImageEncoder(), "cond_stage_model.encoder."), fill(MLPBank(), "cond_stage_model.net.")
    assert relative_error(bank(encoder(draw("encoder:image", (4, 3, 64, 64)).tanh())), golden["tokens"]) < 1e-4


