import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from _golden import FOLDER, draw, fill, load, relative_error
from _tiny import TINY

from encdiff import PRESETS, EncDiff, InputError, ops
from encdiff.diffusion.samplers import ddim
from encdiff.diffusion.schedules import alphas_cumprod, make_betas
from encdiff.models.attention import TransformerBlock
from encdiff.models.unet import UNet


def test_names_and_shapes_are_those_of_published_checkpoints():
    layout = json.loads((FOLDER / "checkpoint_layout.json").read_text())
    state = EncDiff.from_preset("shapes3d").state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == layout


def test_published_ddim_trajectory():
    golden, small = load("ddim_unet_small"), load("unet_small")
    config = json.loads(str(small["config"]))
    unet = fill(
        UNet(3, 16, config["model_channels"], config["channel_mult"], 1, (0, 1), config["num_heads"]),
        "model.diffusion_model.",
    )
    tokens = draw("unet_small:context", (3, 10, 16))[:2]
    visited = []
    last = ddim(
        lambda x_t, t: unet(x_t, t, tokens), draw("ddim:x_T", (2, 3, 16, 16)), alphas_cumprod(make_betas("ldm:linear")),
        steps=10, callback=lambda i, t, x_t, x0: visited.append(x_t.clone()),
    )  # fmt: skip
    trajectory = [*visited[1:], last]
    assert len(trajectory) == len(golden["trajectory"])
    for ours, published in zip(trajectory, golden["trajectory"], strict=True):
        assert relative_error(ours, published) < 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    with torch.device("meta"):
        model = EncDiff.from_preset(name)
    assert model.config is PRESETS[name]


def test_shapes(model, images):
    scalars = model.encode(images)
    tokens = model.tokens(scalars)
    assert scalars.shape == (4, 3) and tokens.shape == (4, 3, 4)
    x_t = torch.randn(4, *model.latent_shape)
    assert model.denoise(x_t, torch.tensor([0, 5, 500, 999]), tokens).shape == x_t.shape == (4, 48, 4, 4)
    assert model.reconstruct(images, steps=2).shape == images.shape
    assert model.traverse(images[0], 1, [-1.0, 0.0, 1.0], steps=2).shape == (3, 3, 16, 16)
    assert model.invert(images, steps=2).shape == (4, 48, 4, 4)


def test_the_loss_is_the_formula_and_reaches_encoder_and_bank(model, images):
    model.train()
    t, noise = torch.tensor([3, 400, 700, 999]), torch.randn(4, *model.latent_shape)
    loss = model.loss(images, t=t, noise=noise)
    a = model.alphas_cumprod[t].float()[:, None, None, None]
    x_t = a.sqrt() * model.to_latents(images) + (1 - a).sqrt() * noise
    expected = (model.denoise(x_t, t, model.tokens(model.encode(images))) - noise).abs().mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for part in (model.encoder, model.bank, model.unet):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_a_weight_of_zero_silences_a_sample(model, images):
    t, noise = torch.tensor([3, 400, 700, 999]), torch.randn(4, *model.latent_shape)
    one = model.loss(images, t=t, noise=noise, weight=torch.tensor([4.0, 0, 0, 0]))
    torch.testing.assert_close(one, model.loss(images[:1], t=t[:1], noise=noise[:1]))


def test_swap_takes_the_chosen_concepts_from_the_source(model, images):
    source, target = images[:2], images[2:]
    scalars = model.encode(target).detach().clone()
    scalars[:, [0, 2]] = model.encode(source)[:, [0, 2]].detach()
    swapped = model.swap(source, target, [0, 2], steps=3)
    torch.testing.assert_close(swapped, model.sample(scalars, steps=3))
    assert not torch.allclose(swapped, model.reconstruct(target, steps=3), atol=1e-3)
    torch.testing.assert_close(model.swap(source, target, [0, 1, 2], steps=3), model.reconstruct(source, steps=3))


def test_traverse_at_its_own_value_is_the_reconstruction(model, images):
    value = model.encode(images[:1])[0, 1].item()
    traversed = model.traverse(images[:1], 1, [value], steps=3)
    torch.testing.assert_close(traversed, model.reconstruct(images[:1], steps=3))


def test_sampling_depends_on_seed_and_start_only(model, images):
    one = model.reconstruct(images, steps=3, seed=1)
    assert torch.equal(one, model.reconstruct(images, steps=3, seed=1))
    assert not torch.equal(one, model.reconstruct(images, steps=3, seed=2))
    x_T = torch.randn(4, *model.latent_shape)
    alone = model.reconstruct(images[1:2], steps=3, x_T=x_T[1:2])
    torch.testing.assert_close(model.reconstruct(images, steps=3, x_T=x_T)[1:2], alone, rtol=1e-3, atol=1e-3)


def test_erasing_every_concept_leaves_nothing_of_the_image(model, images):
    erased = torch.full((4, 3), -torch.inf)
    out = model.reconstruct(images, steps=2, token_bias=erased)
    torch.testing.assert_close(out[0], out[1])


def test_attention_maps_are_the_mean_over_heads_layers_and_noise_levels(model, images):
    maps = model.attention_maps(images, steps=3, seed=4)
    assert maps.shape == (4, 3, 16, 16)
    torch.testing.assert_close(maps.sum(1), torch.ones(4, 16, 16))
    tokens, x0 = model.tokens(model.encode(images)), model.to_latents(images)
    seen = []

    def attend(block, inputs):  # what the block's cross-attention sees, from its input and the formula
        x, cond = inputs
        a = block.attn1
        normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias)
        x = x + ops.cross_attention(normed, normed, *a.weights(), heads=a.heads)
        x = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias)
        q, k = block.attn2.to_q(x).unflatten(-1, (2, -1)), block.attn2.to_k(cond.tokens).unflatten(-1, (2, -1))
        p = (torch.einsum("blhd,bnhd->bhln", q, k) * q.shape[-1] ** -0.5).softmax(-1).mean(1)  # (B, L, N)
        side = int(p.shape[1] ** 0.5)
        p = p.transpose(1, 2).unflatten(2, (side, side))
        seen.append(F.interpolate(p, 16, mode="bilinear", align_corners=False))

    blocks = [m for m in model.unet.modules() if isinstance(m, TransformerBlock)]
    hooks = [block.register_forward_pre_hook(attend) for block in blocks]
    with torch.no_grad():
        for t in (1, 334, 667):
            a = model.alphas_cumprod[t].float()
            noise = ops.normal((1, *model.latent_shape), 4, torch.zeros(1, dtype=torch.int64), t)
            x_t = a.sqrt() * x0 + (1 - a).sqrt() * noise
            model.denoise(x_t, torch.full((4,), t), tokens)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3 * len(blocks)
    torch.testing.assert_close(maps, torch.stack(seen).mean(0))


def test_half_precision_keeps_the_schedule(model, images):
    model.bfloat16()
    assert model.alphas_cumprod.dtype == torch.float64
    assert model.loss(images).isfinite() and model.reconstruct(images, steps=2).isfinite().all()


def test_autocast_leaves_the_target_exact(model, images):
    seen = []
    original = ops.q_sample
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr("encdiff.models.core.ops.q_sample", lambda *a, **k: seen.append(original(*a, **k)) or seen[0])
        noise = torch.randn(4, *model.latent_shape)
        model.loss(images, noise=noise)
    assert torch.equal(seen[0][1], noise)


def test_pictures_leave_the_mode_as_it_was(model, images):
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reconstruct(images, steps=2)
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_attention_and_the_bank_go_through_the_ops(model, images, impl):
    with ops.use_impl(impl), ops.record_impls() as ran:
        model.loss(images)
    names = [op for op, _ in ran]
    blocks = sum(1 for name, _ in model.unet.named_modules() if name.endswith("attn2"))
    assert names.count("cross_attention") == names.count("self_attention") == blocks > 0
    assert names.count("mlp_bank") == names.count("q_sample") == 1
    assert {i for op, i in ran if "attention" in op} == ({"native"} if impl == "auto" else {"reference"})


def test_save_and_load_are_exact(model, images, tmp_path):
    model.save_pretrained(tmp_path / "model")
    loaded = EncDiff.from_pretrained(tmp_path / "model")
    assert loaded.config == TINY and not loaded.training
    assert torch.equal(loaded.reconstruct(images, steps=2), model.reconstruct(images, steps=2))


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 3, 8, 8), r"images are \(2, 3, 8, 8\), must be \(B, 3, 16, 16\)"),
        (torch.zeros(2, 1, 16, 16), r"must be \(B, 3, 16, 16\)"),
        (torch.zeros(3, 16, 16), r"must be \(B, 3, 16, 16\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), r"images are torch.uint8, must be floating point"),
        (torch.full((2, 3, 16, 16), 255.0), r"images span 255 to 255, must lie in \[-1, 1\]"),
        (torch.full((2, 3, 16, 16), torch.nan), r"without NaN"),
        (torch.zeros(2, 3, 16, 16).numpy(), r"images are ndarray, must be a torch.Tensor"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "loss", "reconstruct"])
def test_bad_images(model, method, images, message):
    with pytest.raises(InputError, match=message):
        getattr(model, method)(images)


def test_bad_arguments(model, images):
    with pytest.raises(InputError, match=r"concept is 3, must be an integer in 0\.\.2"):
        model.swap(images, images, [0, 3])
    with pytest.raises(InputError, match=r"concept is -1"):
        model.traverse(images[0], -1, [0.0])
    with pytest.raises(InputError, match="must be one image"):
        model.traverse(images, 0, [0.0])
    with pytest.raises(InputError, match="concept is True"):
        model.swap(images, images, [True])
    with pytest.raises(InputError, match=r"values are \[nan\], must be a list of finite numbers"):
        model.traverse(images[0], 0, [float("nan")])
    with pytest.raises(InputError, match=r"x_T is \(1, 48, 4, 4\), must be \(4, 48, 4, 4\)"):
        model.reconstruct(images, x_T=torch.zeros(1, 48, 4, 4))
    with pytest.raises(InputError, match=r"scalars are \(4, 2\), must be \(B, 3\)"):
        model.sample(torch.zeros(4, 2))
    with pytest.raises(InputError, match="normalize_scalars needs at least 2"):
        EncDiff(replace(TINY, normalize_scalars=True)).encode(images[:1])
    assert torch.equal(model.swap(images, images, np.int64(1), steps=1), model.swap(images, images, [1], steps=1))
    with pytest.raises(InputError, match="must have one shape"):
        model.swap(images, images[:2], 0)
    with pytest.raises(InputError, match="preset 'shapes4d' is unknown, must be one of shapes3d"):
        EncDiff.from_preset("shapes4d")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(concepts=0), "concepts is 0, must be an integer at least 1"),
        (dict(first_stage="vae"), "first_stage is 'vae'"),
        (dict(image_size=20), "image_size is 20, must be a multiple of 8"),
        (dict(attention_levels=(2,)), "attention_levels"),
        (dict(heads=3), "must be a multiple of heads 3"),
        (dict(groups=5), "must be a multiple of groups 5"),
        (dict(resample="linear"), "resample is 'linear'"),
        (dict(schedule="quadratic"), "quadratic"),
        (dict(scaling_factor=0.0), "scaling_factor"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(InputError, match=message):
        EncDiff(replace(TINY, **change))
