"""The first stages: golden numbers of the published autoencoder, its layout, the quantiser, space to depth, files."""

import copy
import json

import numpy as np
import pytest
import torch
from _golden import FOLDER, draw, fill, load, relative_error

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models import autoencoder
from encdiff.models.autoencoder import SpaceToDepth, VectorQuantizer, VQAutoencoder

PREFIX = "first_stage_model."
TINY = {"width": 32, "multipliers": (1, 1), "depth": 1, "latent_channels": 4, "codebook_size": 16}


@pytest.fixture(scope="module")
def paper() -> VQAutoencoder:
    return fill(VQAutoencoder(), PREFIX)


def test_names_and_shapes_equal_the_published_layout():
    layout = json.loads((FOLDER / "checkpoint_layout.json").read_text())
    want = {k.removeprefix(PREFIX): v for k, v in layout.items() if k.startswith(PREFIX)}
    assert {k: list(v.shape) for k, v in VQAutoencoder().state_dict().items()} == want


@torch.no_grad()
def test_latent_codes_and_image_equal_the_published(paper):
    golden = load("first_stage_paper")
    z = paper.encode(draw("vq:image", (2, 3, 64, 64)).tanh())
    assert relative_error(z, golden["z"]) < 1e-4
    z_q, indices, _ = paper.quantize(z)
    assert np.array_equal(indices.numpy(), golden["indices"])
    assert torch.allclose(z_q, paper.quantize.embedding.weight[indices].permute(0, 3, 1, 2), atol=1e-6)
    assert relative_error(paper.decode(z), golden["decoded"]) < 1e-4


@torch.no_grad()
def test_decode_quantises_first(paper):
    z = torch.randn(1, 3, 5, 3)
    z_q = paper.quantize(z)[0]
    torch.testing.assert_close(paper.decode(z), paper.decoder(paper.post_quant_conv(z_q)))
    assert paper.decode(z).shape == (1, 3, 20, 12)


@torch.no_grad()
def test_a_decoder_in_bfloat16_searches_its_codes_in_float32(paper):
    rounded = copy.deepcopy(paper)
    rounded.decoder.to(torch.bfloat16)
    z = torch.randn(2, 3, 6, 4) * paper.quantize.embedding.weight.std()
    z_q = paper.post_quant_conv(paper.quantize(z)[0])
    exact, images = paper.decode(z), rounded.decode(z)
    assert images.dtype == torch.float32
    assert torch.equal(images, rounded.decoder(z_q.bfloat16()).float())
    assert 0 < relative_error(images, exact) < 0.02


@torch.no_grad()
def test_features_stay_in_the_layout_of_latents_and_weights(paper):
    """Exact float32 is slower channels-last on a GPU, bfloat16 slower without (bench/NOTES.md, run 6)."""
    paper, rounded = copy.deepcopy(paper), copy.deepcopy(paper)
    rounded.decoder.to(torch.bfloat16, memory_format=torch.channels_last)
    for stage, last in ((paper, False), (rounded, True)):
        seen: list[torch.Tensor] = []
        for block in (m for m in stage.decoder.modules() if isinstance(m, autoencoder.ResnetBlock)):
            block.register_forward_hook(lambda block, args, y, seen=seen: seen.append(y))
        with ops.record_impls() as ran:
            stage.decode(torch.randn(2, 3, 6, 4))
        assert {y.is_contiguous() for y in seen} == {not last} and len(seen) == 11
        assert {y.is_contiguous(memory_format=torch.channels_last) for y in seen} == {last}
        assert ("group_norm" in dict(ran)) == last


@pytest.mark.parametrize("chunk", [autoencoder.SEARCH_ROWS, 7], ids=["one chunk", "chunks of 7"])
def test_nearest_code_equals_brute_force_in_float64(monkeypatch, chunk):
    monkeypatch.setattr(autoencoder, "SEARCH_ROWS", chunk)
    quantizer = VectorQuantizer(257, 5)
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(3, 5, 7, 11)
    distances = (z.double().permute(0, 2, 3, 1)[..., None, :] - quantizer.embedding.weight.double()).square().sum(-1)
    chosen = distances.gather(-1, quantizer.nearest(z)[..., None])[..., 0]
    assert (chosen - distances.min(-1).values).max() < 1e-5


def test_nearest_code_under_autocast_is_that_of_float32():
    quantizer = VectorQuantizer(512, 3)
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(z), quantizer.nearest(z.float()))
        found = quantizer.nearest(z)
    assert torch.equal(found, quantizer.nearest(z))


@pytest.mark.parametrize("codes,used", [(32, 32), (64, 40)], ids=["fewer codes than positions", "more"])
def test_fitted_codes_are_latents_without_needless_repeats(codes, used):
    quantizer = VectorQuantizer(codes, 3)
    z = torch.randn(2, 3, 4, 5)
    quantizer.fit(z)
    rows = {tuple(row) for row in z.permute(0, 2, 3, 1).reshape(-1, 3).tolist()}
    drawn = {tuple(row) for row in quantizer.embedding.weight.tolist()}
    assert drawn <= rows and len(drawn) == used
    assert len(quantizer.nearest(z).unique()) == used


def test_quantiser_passes_the_gradient_straight_through():
    quantizer = VectorQuantizer(32, 3)
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    upstream = torch.randn_like(z)
    z_q, _, _ = quantizer(z)
    (gradient,) = torch.autograd.grad((z_q * upstream).sum(), z)
    assert torch.equal(gradient, upstream)


def test_codebook_loss_is_equation_3():
    quantizer = VectorQuantizer(32, 3)
    quantizer.embedding.weight.data.normal_()
    z = torch.randn(2, 3, 4, 5, requires_grad=True)
    _, indices, loss = quantizer(z)
    loss.backward()
    e = quantizer.embedding.weight.detach()[indices].permute(0, 3, 1, 2)
    distance = (e - z.detach()).square().mean()
    torch.testing.assert_close(loss.detach(), 1.25 * distance)
    torch.testing.assert_close(z.grad, 0.25 * 2 * (z.detach() - e) / z.numel())  # beta on the commitment
    codes = torch.zeros_like(quantizer.embedding.weight)
    codes.index_add_(0, indices.flatten(), (2 * (e - z.detach()) / z.numel()).permute(0, 2, 3, 1).reshape(-1, 3))
    torch.testing.assert_close(quantizer.embedding.weight.grad, codes)


@pytest.mark.parametrize("patch,height,width", [(1, 3, 5), (2, 6, 10), (3, 9, 6)])
def test_space_to_depth_round_trip(patch, height, width):
    stage, images = SpaceToDepth(patch), torch.randn(2, 3, height, width)
    z = stage.encode(images)
    assert z.shape == (2, stage.latent_channels, height // stage.downsampling, width // stage.downsampling)
    assert torch.equal(stage.decode(z), images)
    assert not stage.state_dict()


def test_space_to_depth_orders_channel_then_row_then_column():
    images = torch.randn(1, 3, 4, 6)
    z = SpaceToDepth(2).encode(images)
    assert z[0, 2 * 4 + 1 * 2 + 0, 1, 2] == images[0, 2, 1 * 2 + 1, 2 * 2 + 0]


def test_saved_model_comes_back_equal(tmp_path):
    model = VQAutoencoder(**TINY)
    model.save_pretrained(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"config.json", "model.safetensors"}
    again = VQAutoencoder.from_pretrained(tmp_path / "model")
    assert again.config == model.config and again.downsampling == 2 and not again.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_damaged_folders_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="config.json and model.safetensors"):
        VQAutoencoder.from_pretrained(tmp_path)
    VQAutoencoder(**TINY).save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="model.safetensors: not a whole"):
        VQAutoencoder.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**TINY, "codebook_size": 17}))
    with pytest.raises(InputError, match="model.safetensors: does not fit"):
        VQAutoencoder.from_pretrained(tmp_path)
    config.write_text(json.dumps({"breadth": 32}))
    with pytest.raises(InputError, match="breadth"):
        VQAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 6, 9),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(3, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["odd side", "grey", "no batch", "uint8"],
)
@pytest.mark.parametrize("stage", [SpaceToDepth(2), VQAutoencoder(**TINY)], ids=["space to depth", "vq"])
def test_wrong_images_are_refused(stage, images):
    with pytest.raises(InputError, match="^images: "):
        stage.encode(images)
    with pytest.raises(InputError, match="^z: "):
        stage.decode(torch.zeros(2, 5, 4, 4))


def test_wrong_configurations_are_refused():
    for wrong in ({"width": 16}, {"multipliers": ()}, {"depth": 0}, {"codebook_size": 0}):
        with pytest.raises(InputError):
            VQAutoencoder(**wrong)
    with pytest.raises(InputError):
        SpaceToDepth(0)
