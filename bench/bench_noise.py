"""The noise engine: noising a batch and one DDIM step, against eager and compiled PyTorch and diffusers.

`percent_of_bound` is per cent of the copy bandwidth. Outputs are fresh tensors but for `ours_out` and `copy`, which
write into given ones: on a CPU the pages of a fresh tensor can cost more than the arithmetic.
"""

import math

import pytest
import torch

from encdiff.diffusion.samplers import ddim_coefficients
from encdiff.diffusion.schedules import alphas_cumprod, ddim_timesteps, make_betas
from encdiff.ops.noise import q_sample, step

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
SHAPES = {"4096x3x16x16": (4096, 3, 16, 16), "64x3x16x16": (64, 3, 16, 16)}
IMPLS = ("eager", "compiled", "diffusers", "ours", "ours_out")
CASES = [(shape, "float32", impl) for shape in SHAPES for impl in IMPLS]
CASES += [("4096x3x16x16", "bfloat16", impl) for impl in ("eager", "ours", "ours_out")]
cases = pytest.mark.parametrize("shape,dtype,impl", CASES)


def eager_q_sample(x0, t, signal, sigma):
    """What a training script does: indexed roots, fresh noise; the noise is the target."""
    noise = torch.randn_like(x0)
    return signal[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise, noise


def eager_step(x_t, output, alpha, alpha_prev):
    """DDIM eq. 12 with eta 0, per-sample alpha_bar (B, 1, 1, 1)."""
    x0 = (x_t - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return alpha_prev.sqrt() * x0 + (1 - alpha_prev).sqrt() * output


def scheduler(steps=50):
    diffusers = pytest.importorskip("diffusers", reason="one of the baselines is diffusers")
    made = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, timestep_spacing="leading",
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


def q_sample_runs(x0, t):
    alpha_bar, native = ALPHA_BAR.to(x0.device), torch.ops.encdiff_native
    signal, sigma = alpha_bar.sqrt().to(x0.dtype), (1 - alpha_bar).sqrt().to(x0.dtype)
    ids, draw, out = torch.arange(len(x0), device=x0.device), torch.zeros(1, dtype=torch.int64, device=x0.device), {}

    def diffusers_form():
        noise = torch.randn_like(x0)
        return scheduler_.add_noise(x0, noise, t), noise

    def into():
        if not out:
            out["x_t"], out["target"] = torch.empty_like(x0), torch.empty_like(x0)
        native.q_sample_out(x0, None, t, alpha_bar, None, 1, ids, draw, 0, 1, out["x_t"], out["target"], None)
        return out["x_t"], out["target"]

    scheduler_, compiled = scheduler(), torch.compile(eager_q_sample)
    return {
        "eager": lambda: eager_q_sample(x0, t, signal, sigma),
        "compiled": lambda: compiled(x0, t, signal, sigma),
        "diffusers": diffusers_form,
        "ours": lambda: q_sample(x0, None, t, alpha_bar, seed=1, sample_ids=ids, draw=draw),
        "ours_out": into,
    }


@cases
def test_q_sample(measure, benchmark, device, shape, dtype, impl):
    if impl == "compiled" and benchmark.disabled:
        pytest.skip("compiling takes longer than a smoke test may")
    torch.manual_seed(0)
    x0 = torch.randn(SHAPES[shape], device=device, dtype=getattr(torch, dtype))
    t = torch.randint(len(ALPHA_BAR), (len(x0),), device=device)
    run = q_sample_runs(x0, t)[impl]
    q_sample(x0, None, t, ALPHA_BAR.to(device), seed=1, impl="native")  # built and loaded before it is timed
    x_t, noise = run()
    expected, _ = q_sample(x0, noise, t, ALPHA_BAR.to(device), impl="reference")
    assert (x_t.float() - expected.float()).norm() <= (1e-5 if dtype == "float32" else 2e-2) * expected.float().norm()
    assert abs(noise.double().mean()) < 6 / math.sqrt(noise.numel()) and abs(noise.double().std() - 1) < 0.02
    labels = {"op": "q_sample", "impl": impl, "phase": "step", "shape": f"{shape} {dtype}"}
    measure(run, **labels, dtype=x0.dtype, bytes=3 * x0.nbytes, flops=0)


@cases
def test_step(measure, benchmark, device, shape, dtype, impl):
    if impl == "compiled" and benchmark.disabled:
        pytest.skip("compiling takes longer than a smoke test may")
    torch.manual_seed(0)
    x_t, output = (torch.randn(SHAPES[shape], device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    timesteps = ddim_timesteps(50, len(ALPHA_BAR))
    rows = torch.randint(1, 50, (len(x_t),)) if impl != "diffusers" else torch.full((len(x_t),), 25)
    c = ddim_coefficients(ALPHA_BAR, timesteps)[rows].to(device, torch.float32)
    alpha, alpha_prev = (ALPHA_BAR[timesteps[r]].view(-1, 1, 1, 1).to(device, x_t.dtype) for r in (rows, rows - 1))
    x_prev, scheduler_, compiled = torch.empty_like(x_t), scheduler(), torch.compile(eager_step)

    def into():
        none = None
        torch.ops.encdiff_native.step_out(
            x_t, output, none, c, none, none, none, none, none, none, 0, 0, math.inf, 1.0, x_prev, none
        )
        return x_prev

    expected = step(x_t.float(), output.float(), c, impl="reference")
    step(x_t, output, c, impl="native")
    run = {
        "eager": lambda: eager_step(x_t, output, alpha, alpha_prev),
        "compiled": lambda: compiled(x_t, output, alpha, alpha_prev),
        "diffusers": lambda: scheduler_.step(output, int(timesteps[25]), x_t).prev_sample,
        "ours": lambda: step(x_t, output, c),
        "ours_out": into,
    }[impl]
    assert (run().float() - expected).norm() <= (1e-4 if dtype == "float32" else 5e-2) * expected.norm()
    labels = {"op": "step", "impl": impl, "phase": "step", "shape": f"{shape} {dtype}"}
    measure(run, **labels, dtype=x_t.dtype, bytes=3 * x_t.nbytes, flops=0)
