"""Blocks `whole` and `sampling`: what runs is right as a whole, and images from codes by DDIM.

Times of sampling are of all evaluations of the U-Net with the bank before and the decoder after them, divided by the
evaluations. The profile is of one whole sampling at the larger batch.
"""

from operator import sub

import torch

from bench.baselines import Rounded, fresh_model, published_twin
from bench.clock import called, replayed
from bench.cost import sampling_cost
from bench.gpu.lab import Lab
from bench.gpu.steps import advance, ours, profile, profile_lines
from encdiff import SamplingEngine
from encdiff.engine import float32_precision
from encdiff.ops import normal, q_sample


@float32_precision(tf32=False)
def check(lab: Lab) -> dict:
    """Native noise on the device = on the CPU; graph = eager; the sampling engine = sample; each as a number."""
    found: dict[str, object] = {}
    ids, on = torch.arange(64), lab.device
    x0, t = torch.randn(64, 3, 16, 16), torch.randint(1000, (64,))
    alphas = fresh_model(lab.config, torch.device("cpu")).alphas_cumprod
    for name, make in {
        "normal": lambda d: normal((64, 3, 16, 16), 1, ids.to(d), impl="native"),
        "q_sample": lambda d: q_sample(
            x0.to(d), None, t.to(d), alphas.to(d), seed=1, sample_ids=ids.to(d), impl="native"
        )[0],
    }.items():  # fmt: skip
        cpu, device = make("cpu"), make(on).cpu()
        found[f"native {name}: greatest difference"] = (cpu - device).abs().max().item()
    runs = {"eager": {"engine": "eager"}}
    if not lab.cpu:
        runs |= {"graph": {"engine": "graph"}, "graph, one stream": {"engine": "graph", "aside": False}}
    losses = {name: _losses(lab, masters=True, precision="bf16", **options) for name, options in runs.items()}
    found["losses of 20 steps"] = losses
    found |= {f"{name} - eager": max(map(abs, map(sub, losses[name], losses["eager"]))) for name in losses}
    model = fresh_model(lab.config, on).eval()
    scalars = torch.randn(3, lab.config.concepts, device=on)
    engine = SamplingEngine(model, sampler="ddim", steps=4)
    for _ in range(3):
        drawn = engine(scalars)
    expected = model.sample(scalars, sampler="ddim", steps=4)
    twin = published_twin(model).sample(scalars, normal((3, *model.latent_shape), 0, ids[:3].to(on) * 0), 4)
    found["engine - sample, relative"] = ((drawn - expected).norm() / expected.norm()).item()
    found["sample - published, relative"] = ((expected - twin).norm() / twin.norm()).item()
    return found


def _losses(lab: Lab, **options) -> list[float]:
    """Of 20 steps at a rate that moves them, from the same weights, latents and images."""
    training = ours(lab, rate=1e-4, **options)
    torch.manual_seed(7)
    training.latents = torch.randn(lab.batch, *training.model.latent_shape).to(lab.device)
    step = advance(training, lab)
    return [float(step()["loss"]) for _ in range(20)]


def check_lines(found: dict) -> list[str]:
    return [f"{name}: {value:.3g}" for name, value in found.items() if isinstance(value, float)]


EXACT = "bf16, decoder in float32"  # as the engine was before it rounded its decoder


@float32_precision(tf32=False)
def measure(lab: Lab, ours_alone: bool = False) -> dict:
    """Ours first, at both batches; then the published form, which the host slows."""
    steps = 3 if lab.cpu else 10
    found = {"steps": steps, "tf32": False, "seconds": {}, "bound": {}, "profile": {}}
    model = fresh_model(lab.config, lab.device).eval()
    twin = None if ours_alone else published_twin(model)
    for kind in ("ours",) if ours_alone else ("ours", "published"):
        for batch in (lab.batch, 1):
            scalars = torch.randn(batch, lab.config.concepts, device=lab.device)
            x_T = torch.randn(batch, *model.latent_shape, device=lab.device)
            for precision in ("bf16", EXACT, "float32") if kind == "ours" else ("bf16", "float32"):
                run = _ours(model, precision, steps) if kind == "ours" else _published(twin, precision, steps)
                key = f"{kind}, {precision}, B={batch}"
                found["seconds"][key] = called(lambda r=run, s=scalars, x=x_T: r(s, x), lab.device, 3, 2) / steps
                lab.save("sampling", found)
            found["bound"][batch] = sampling_cost(lab.config, batch, steps, torch.bfloat16)
    scalars, x_T = (torch.randn(lab.batch, *s, device=lab.device) for s in ((lab.config.concepts,), model.latent_shape))
    for precision in ("bf16", EXACT):
        run = _ours(model, precision, steps)
        found["profile"][precision] = profile(lab, lambda r=run: r(scalars, x_T))
        lab.save("sampling", found)
    return found


def _ours(model, precision: str, steps: int):
    engine = SamplingEngine(
        model, precision="float32" if precision == "float32" else "bf16", sampler="ddim", steps=steps
    )
    if precision == EXACT:
        engine.model.first_stage_model = model.first_stage
    return lambda scalars, x_T: engine(scalars, x_T=x_T)


def _published(twin, precision: str, steps: int):
    def run(scalars, x_T):
        with torch.autocast(scalars.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return twin.sample(scalars, x_T, steps)

    return run


def lines(found: dict) -> list[str]:
    times = [f"{name:38} {1e3 * s:8.3f} ms an evaluation" for name, s in found.get("seconds", {}).items()]
    return times + profile_lines(found.get("profile", {}))


def measure_unet(lab: Lab, ours_alone: bool = False) -> dict:
    """One evaluation of the U-Net without gradients, bf16, in a graph; of the published form its own kernels."""
    model = fresh_model(lab.config, lab.device).eval()
    x = torch.randn(lab.batch, *model.latent_shape, device=lab.device)
    t = torch.randint(1000, (lab.batch,), device=lab.device)
    tokens = torch.randn(lab.batch, lab.config.concepts, lab.config.token_width, device=lab.device)
    forms = {"U-Net forward, ours, bf16 weights": lambda: Rounded(model.unet)}
    if not ours_alone:
        for form in ("sdpa", "einsum"):
            forms[f"U-Net forward, published, {form}"] = lambda form=form: published_twin(model, form).unet
    found: dict[str, dict] = {"seconds": {}}
    for name, make in forms.items():
        unet = make()

        @torch.no_grad()
        def run(unet=unet):
            with torch.autocast(lab.device.type, torch.bfloat16, cache_enabled=False):
                return unet(x, t, tokens)

        found["seconds"][name] = replayed(run, lab.device, calls=4)
        lab.save("unet", found)
    return found
