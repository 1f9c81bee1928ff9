import json

import pytest
import torch
from _golden import draw, fill, load, relative_error

from encdiff import ops
from encdiff.errors import InputError
from encdiff.models.unet import UNet, timestep_embedding

PREFIX = "model.diffusion_model."


def golden_unet(config: dict) -> UNet:
    levels = [config["attention_resolutions"].index(2**i) for i in range(len(config["channel_mult"])) if 2**i in config["attention_resolutions"]]
    return UNet(config["in_channels"], config["context_dim"], config["model_channels"], config["channel_mult"], config["num_res_blocks"], levels, config["num_heads"])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", ["unet_small", "unet_paper"])
def test_published_outputs_and_gradients(name, impl):
    golden = load(name)
    config = json.loads(str(golden["config"]))
    unet = fill(golden_unet(config), PREFIX)
    x = draw(f"{name}:x", golden["y"].shape).requires_grad_()
    tokens = draw(f"{name}:context", golden["grad_context"].shape).requires_grad_()
    with ops.use_impl(impl):
        y = unet(x, torch.from_numpy(golden["t"]), tokens)
    y.backward(draw(f"{name}:grad_out", y.shape))
    assert relative_error(y, golden["y"]) < 1e-4
    assert relative_error(x.grad, golden["grad_x"]) < 1e-3
    assert relative_error(tokens.grad, golden["grad_context"]) < 1e-3
    parameters = dict(unet.named_parameters())
    for key in (k for k in golden if k.startswith("grad:")):
        assert relative_error(parameters[key.removeprefix("grad:")].grad, golden[key]) < 1e-3, key


