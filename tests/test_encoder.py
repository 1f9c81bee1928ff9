import pytest
import torch
from _golden import draw, fill, load, relative_error
from torch import nn

from encdiff.errors import InputError
from encdiff.models.encoder import ImageEncoder, ResidualBlock
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


@pytest.mark.parametrize("image_size", [8, 16, 32, 128])
def test_other_sizes(image_size):
    encoder = ImageEncoder(image_size, concepts=7, width=4, in_channels=1).eval()
    assert encoder(torch.zeros(2, 1, image_size, image_size)).shape == (2, 7)


def test_the_residual_block_adds_its_untouched_input():
    block = ResidualBlock(2).eval()
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(block(x), x)  # an in-place ReLU would cut it at zero


@pytest.mark.parametrize("image_size", [4, 20, 63])
def test_bad_size(image_size):
    with pytest.raises(InputError, match=f"image_size is {image_size}, must be 4"):
        ImageEncoder(image_size)
