"""Concept edits of diffusers' U-Nets: tiny ones in the forms of Stable Diffusion 1, 2 and XL."""

import pytest
import torch

from encdiff import InputError
from encdiff.edit import Edit, end_of_text, mist, uce

diffusers = pytest.importorskip("diffusers", reason="the U-Nets are those of diffusers")

BLOCKS = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
COMMON = dict(sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32)
FORMS = {
    "sd1": {"attention_head_dim": 8},
    "sd2": {"attention_head_dim": 8, "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": 8, "use_linear_projection": True, "transformer_layers_per_block": 2,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    },
}  # fmt: skip


def tiny(form: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**COMMON, **BLOCKS, **FORMS[form]).eval()


def draw(unet, prompt):
    generator = torch.Generator().manual_seed(1)
    x, pooled = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 32, generator=generator)
    added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)} if unet.config.addition_embed_type else None
    with torch.no_grad():
        return unet(x, 300, prompt, added_cond_kwargs=added).sample


@pytest.mark.parametrize("form", FORMS)
def test_the_output_moves_with_the_concept_and_hardly_without(form, tmp_path):
    unet = tiny(form)
    tokens = torch.linalg.qr(torch.randn(32, 32))[0] * 5
    c, wanted, kept = tokens[:1], tokens[1:2], tokens[2:12]
    with_c, without = torch.cat([c, kept])[None], kept[None]
    before = [draw(unet, prompt) for prompt in (with_c, without)]
    keys = {n: w.clone() for n, w in unet.state_dict().items() if not n.endswith("attn2.to_v.weight")}
    edit = mist(unet, c, wanted, kept, lam=1e-6, keep_scale=1)
    edit.save(tmp_path / "edit.safetensors")
    edit = Edit.load(tmp_path / "edit.safetensors", unet)
    edit.apply(unet)
    assert all(torch.equal(unet.state_dict()[name], weight) for name, weight in keys.items())
    moved = [(draw(unet, p) - b).norm() / b.norm() for p, b in zip((with_c, without), before, strict=True)]
    assert moved[0] > 100 * moved[1] > 0 and moved[1] < 1e-5
    edit.undo(unet)
    assert torch.equal(draw(unet, with_c), before[0])


@pytest.mark.parametrize("form", FORMS)
def test_uce_makes_one_concept_another(form):
    unet, (c, wanted) = tiny(form), torch.randn(2, 1, 32)
    other = draw(unet, torch.cat([wanted, wanted])[None])
    assert (draw(unet, torch.cat([c, wanted])[None]) - other).norm() > 1e-3
    edit = uce(unet, torch.cat([c, wanted]), torch.cat([wanted, wanted]), lam=1e-9)
    assert len(edit.weights) == 2 * sum(name.endswith("attn2") for name, _ in unet.named_modules())
    edit.apply(unet)
    torch.testing.assert_close(draw(unet, torch.cat([c, wanted])[None]), other, rtol=1e-4, atol=1e-5)


def test_unets_and_states_that_are_refused():
    c = torch.randn(1, 32)
    plain = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,), layers_per_block=1, norm_num_groups=8,
                        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip
    with pytest.raises(InputError, match="this UNet2DModel has no cross-attention"):
        mist(plain, c, c)
    unet = tiny("sd1")
    edit = mist(unet, c, 2 * c, name="cat")
    with pytest.raises(
        InputError, match="edit 'cat': is of a U-Net whose .* torch.float32, here it is .*torch.float16"
    ):
        edit.apply(tiny("sd1").half())
    unet.fuse_qkv_projections()
    with pytest.raises(InputError, match="its projections are fused; call unfuse_qkv_projections"):
        mist(unet, c, c)


def test_a_second_attention_to_oneself_is_no_cross_attention():
    unet = diffusers.UNet2DConditionModel(**COMMON, **BLOCKS, attention_head_dim=8, only_cross_attention=True)
    names = {name.split(".")[-3] for name in uce(unet, torch.randn(1, 32), torch.randn(1, 32)).weights}
    assert names == {"attn1", "attn2"}, "both attend to the prompt here"


def test_the_end_of_text_is_found_before_its_padding():
    ids = torch.tensor([[1, 5, 9, 9, 9], [1, 5, 6, 7, 9]])
    embeddings = torch.randn(2, 5, 3)
    found = end_of_text(embeddings, ids, eos_token_id=9)
    assert torch.equal(found, torch.stack([embeddings[0, 2], embeddings[1, 4]]))
    with pytest.raises(InputError, match="a prompt has no 8, must end in eos_token_id"):
        end_of_text(embeddings, ids, eos_token_id=8)
    with pytest.raises(InputError, match=r"must be \(B, T, D\) and \(B, T\)"):
        end_of_text(embeddings[0], ids)
