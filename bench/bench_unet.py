"""One evaluation of the paper's U-Net, without and with gradients: the published form, stock compilers, ours.

`ours` computes under autocast in bfloat16, `ours_bf16_weights` with a copy in bfloat16, as training and sampling do on
a GPU. Outputs and the gradient of x_t are compared with the published form's before anything is timed.
"""

import functools

import torch
from torch import Tensor

from bench.baselines import PAPER, SMOKE, Rounded, as_exact, compiled, diffusers_unet, fresh_model, published_twin
from bench.cases import DTYPE, GPU, PHASES, cases
from bench.cost import unet_cost

BATCH = 128 if GPU else 16
CALLS = 4  # of thousands of kernels, in one graph


IMPLS = {  # from our model and a compiler to a function of (x, t, tokens)
    "published": lambda model, compile: published_twin(model).unet,
    "sdpa": lambda model, compile: published_twin(model, "sdpa").unet,
    "published_compiled": lambda model, compile: compile(published_twin(model, "sdpa").unet),
    "diffusers": lambda model, compile: compile(diffusers_unet(model.config).to(model.alphas_cumprod.device)),
    "ours": lambda model, compile: model.unet.to(memory_format=torch.channels_last),
    "ours_bf16_weights": lambda model, compile: Rounded(model.unet),
}
ONE_DTYPE = {"published_compiled": DTYPE, "diffusers": DTYPE, "ours_bf16_weights": torch.bfloat16}  # minutes to compile
CASES = [(impl, dtype, phase) for impl in IMPLS for dtype in (torch.float32, torch.bfloat16) for phase in PHASES
         if ONE_DTYPE.get(impl, dtype) == dtype]  # fmt: skip


def decides(impl, dtype, phase) -> bool:
    if GPU:
        return dtype == DTYPE and impl not in ("sdpa", "ours")
    return impl not in ("sdpa", "diffusers", "ours_bf16_weights")


@cases("impl, dtype, phase", CASES, decides)
def test_unet(measure, rotated, smoke, device, phase, impl, dtype):
    config, batch = (SMOKE, 2) if smoke else (PAPER, BATCH)
    model = fresh_model(config, device)
    published = published_twin(model).unet
    unet = IMPLS[impl](model, functools.partial(compiled, device=device, smoke=smoke))

    def draw() -> tuple[Tensor, ...]:
        """x_t, tokens, t and the upstream gradient."""
        x, upstream = (torch.randn(batch, *model.latent_shape, device=device) for _ in range(2))
        tokens = torch.randn(batch, config.concepts, config.token_width, device=device)
        t = torch.randint(config.num_timesteps, (batch,), device=device)
        return x.requires_grad_(), tokens.requires_grad_(), t, upstream

    def evaluate(x, tokens, t, unet=unet, dtype=dtype) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return unet(x, t, tokens)

    @torch.no_grad()
    def forward(x, tokens, t, upstream, **options) -> Tensor:
        return evaluate(x, tokens, t, **options)

    def gradients(x, tokens, t, upstream, wanted=(), **options) -> tuple[Tensor, ...]:
        y = evaluate(x, tokens, t, **options)
        return torch.autograd.grad(y, [x, *wanted], upstream.to(y.dtype))

    costs = unet_cost(config, batch, phase, dtype)
    sets = rotated(draw, costs["bytes"])
    if impl != "diffusers":  # which is a network of its own
        result = forward if phase == "forward" else lambda *given, **options: gradients(*given, **options)[0]
        exact = result(*sets[0], unet=published, dtype=torch.float32)
        assert as_exact(result(*sets[0]), result(*sets[0], unet=published), exact)
    labels = {"op": "unet", "impl": impl, "phase": phase}
    labels["shape"] = f"B={batch} {'x'.join(map(str, model.latent_shape))}"
    if phase == "forward":
        runs = [functools.partial(forward, *given) for given in sets]
    else:
        runs = [functools.partial(gradients, *given, wanted=[given[1], *unet.parameters()]) for given in sets]
    measure(runs, **labels, dtype=dtype, samples=batch, calls=CALLS, **costs)
