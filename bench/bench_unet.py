"""One evaluation of the paper's U-Net, without and with gradients: the published form, stock compilers, ours.

Outputs and the gradient of x_t are compared with the published form's before anything is timed.
"""

import functools

import pytest
import torch

from bench.baselines import (
    PAPER,
    SMOKE,
    as_exact,
    compiled,
    diffusers_unet,
    fresh_model,
    published_twin,
)
from bench.cost import unet_cost

GPU = torch.cuda.is_available()
BATCH = 128 if GPU else 16
IMPLS = {  # from our model and a compiler to a function of (x, t, tokens)
    "published": lambda model, compile: published_twin(model).unet,
    "sdpa": lambda model, compile: published_twin(model, "sdpa").unet,
    "published_compiled": lambda model, compile: compile(published_twin(model, "sdpa").unet),
    "diffusers": lambda model, compile: compile(diffusers_unet(model.config).to(model.alphas_cumprod.device)),
    "ours": lambda model, compile: model.unet.to(memory_format=torch.channels_last),
}
ONE_DTYPE = ("published_compiled", "diffusers")  # minutes to compile
CASES = [(impl, dtype) for impl in IMPLS for dtype in (torch.float32, torch.bfloat16)
         if impl not in ONE_DTYPE or (dtype == torch.bfloat16) == GPU]  # fmt: skip


@pytest.mark.parametrize("phase", ["forward", "forward_backward"])
@pytest.mark.parametrize("impl, dtype", CASES, ids=str)
def test_unet(measure, benchmark, device, phase, impl, dtype):
    config, batch = (SMOKE, 2) if benchmark.disabled else (PAPER, BATCH)
    model = fresh_model(config, device)
    published = published_twin(model).unet
    unet = IMPLS[impl](model, functools.partial(compiled, device=device, smoke=benchmark.disabled))
    x, upstream = (torch.randn(batch, *model.latent_shape, device=device) for _ in range(2))
    t = torch.randint(config.num_timesteps, (batch,), device=device)
    tokens = torch.randn(batch, config.concepts, config.token_width, device=device)
    learnt = [x.requires_grad_(), tokens.requires_grad_(), *unet.parameters()]

    def evaluate(unet=unet, dtype=dtype):
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return unet(x, t, tokens)

    def forward(**options):
        with torch.no_grad():
            return evaluate(**options)

    def forward_backward(wanted=learnt, **options):
        y = evaluate(**options)
        return torch.autograd.grad(y, wanted, upstream.to(y.dtype))

    if impl != "diffusers":  # which is a network of its own
        run = forward if phase == "forward" else lambda **options: forward_backward([x], **options)[0]
        assert as_exact(run(), run(unet=published), run(unet=published, dtype=torch.float32))
    shape = f"B={batch} {'x'.join(map(str, model.latent_shape))}"
    labels = {"op": "unet", "impl": impl, "phase": phase, "shape": shape}
    run = forward if phase == "forward" else forward_backward
    measure(run, **labels, dtype=dtype, samples=batch, **unet_cost(config, batch, phase, dtype))
