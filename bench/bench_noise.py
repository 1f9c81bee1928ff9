"""The noise engine: noising a batch and one DDIM step, against eager and compiled PyTorch and diffusers.

`percent_of_bound` is per cent of the bandwidth of a copy past every cache. Outputs are fresh tensors but for
`eager_out`, `ours_out` and `copy` (of a tensor of that shape), which write into given ones: on a CPU the pages of a
fresh tensor can cost more than the arithmetic, depending on what the C library's malloc has seen before.

    python -m bench.bench_noise [threads]    # the two figures that matter on a CPU, minima of interleaved runs
"""

import functools
import math
import sys
import time

import pytest
import torch

from bench.baselines import compiled
from bench.cases import GPU, cases
from encdiff.diffusion.samplers import ddim_coefficients
from encdiff.diffusion.schedules import alphas_cumprod, ddim_timesteps, make_betas
from encdiff.ops.noise import q_sample, step

ALPHA_BAR = alphas_cumprod(make_betas("scaled_linear"))
SMALL = "64x3x16x16"
SHAPES = {"4096x3x16x16": (4096, 3, 16, 16), SMALL: (64, 3, 16, 16)}
IMPLS = ("eager", "eager_out", "compiled", "diffusers", "ours", "ours_out")
CASES = [(shape, "float32", impl) for shape in SHAPES for impl in IMPLS]
CASES += [("4096x3x16x16", "bfloat16", impl) for impl in ("eager", "ours", "ours_out")]
DECIDE = ("eager", "compiled", "ours") if GPU else ("eager", "eager_out", "compiled", "ours", "ours_out")


def eager_q_sample(x0, t, signal, sigma):
    """What a training script does: indexed roots, fresh noise; the noise is the target."""
    noise = torch.randn_like(x0)
    return signal[t].view(-1, 1, 1, 1) * x0 + sigma[t].view(-1, 1, 1, 1) * noise, noise


def eager_step(x_t, output, alpha, alpha_prev):
    """DDIM eq. 12 with eta 0, per-sample alpha_bar (B, 1, 1, 1)."""
    x0 = (x_t - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return alpha_prev.sqrt() * x0 + (1 - alpha_prev).sqrt() * output


@functools.cache
def scheduler(steps=50):
    diffusers = pytest.importorskip("diffusers", reason="one of the baselines is diffusers")
    made = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0155, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False, timestep_spacing="leading",
    )  # fmt: skip
    made.set_timesteps(steps)
    return made


def q_sample_runs(x0, t, compiled=eager_q_sample):
    alpha_bar, out = ALPHA_BAR.to(x0.device), (torch.empty_like(x0), torch.empty_like(x0))
    signal, sigma = alpha_bar.sqrt().to(x0.dtype), (1 - alpha_bar).sqrt().to(x0.dtype)
    ids, draw = torch.arange(len(x0), device=x0.device), torch.zeros(1, dtype=torch.int64, device=x0.device)

    def diffusers_form():
        noise = torch.randn_like(x0)
        return scheduler().add_noise(x0, noise, t), noise

    def eager_out():
        x_t, noise = out
        torch.randn(x0.shape, out=noise)
        torch.mul(signal[t].view(-1, 1, 1, 1), x0, out=x_t)
        return x_t.addcmul_(sigma[t].view(-1, 1, 1, 1), noise), noise

    def ours(out=None):
        return q_sample(x0, None, t, alpha_bar, seed=1, sample_ids=ids, draw=draw, out=out)

    return {
        "eager": lambda: eager_q_sample(x0, t, signal, sigma),
        "eager_out": eager_out,
        "compiled": lambda: compiled(x0, t, signal, sigma),
        "diffusers": diffusers_form,
        "ours": ours,
        "ours_out": lambda: ours(out),
    }


def step_runs(x_t, output, c, alpha, alpha_prev, t, compiled=eager_step):
    x_prev = torch.empty_like(x_t)

    def eager_out():
        a, b = (alpha_prev / alpha).sqrt(), (1 - alpha_prev).sqrt() - (alpha_prev * (1 - alpha) / alpha).sqrt()
        return torch.mul(a, x_t, out=x_prev).addcmul_(b, output)

    return {
        "eager": lambda: eager_step(x_t, output, alpha, alpha_prev),
        "eager_out": eager_out,
        "compiled": lambda: compiled(x_t, output, alpha, alpha_prev),
        "diffusers": lambda: scheduler().step(output, t, x_t).prev_sample,
        "ours": lambda: step(x_t, output, c),
        "ours_out": lambda: step(x_t, output, c, out=x_prev),
    }


def step_inputs(shape, device, dtype, same_row=False):
    x_t, output = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    timesteps = ddim_timesteps(50, len(ALPHA_BAR))
    rows = torch.full((len(x_t),), 25) if same_row else torch.randint(1, 50, (len(x_t),))
    c = ddim_coefficients(ALPHA_BAR, timesteps)[rows].to(device, torch.float32)
    alpha, alpha_prev = (ALPHA_BAR[timesteps[r]].view(-1, 1, 1, 1).to(device, dtype) for r in (rows, rows - 1))
    return x_t, output, c, alpha, alpha_prev, int(timesteps[25])


def decides(shape, dtype, impl) -> bool:
    return shape == "4096x3x16x16" and dtype == "float32" and impl in DECIDE


@cases("shape, dtype, impl", CASES, decides)
def test_q_sample(measure, rotated, smoke, device, shape, dtype, impl):
    shape, form = SMALL if smoke else shape, compiled(eager_q_sample, device, smoke or impl != "compiled")

    def draw():
        x0 = torch.randn(SHAPES[shape], device=device, dtype=getattr(torch, dtype))
        return x0, torch.randint(len(ALPHA_BAR), (len(x0),), device=device)

    size = 3 * math.prod(SHAPES[shape]) * getattr(torch, dtype).itemsize
    sets = rotated(draw, size)
    (x0, t), runs = sets[0], [q_sample_runs(*given, form)[impl] for given in sets]
    q_sample(x0, None, t, ALPHA_BAR.to(device), seed=1, impl="native")  # built and loaded before it is timed
    x_t, noise = runs[0]()
    expected, _ = q_sample(x0, noise, t, ALPHA_BAR.to(device), impl="reference")
    assert (x_t.float() - expected.float()).norm() <= (1e-5 if dtype == "float32" else 2e-2) * expected.float().norm()
    assert abs(noise.double().mean()) < 6 / math.sqrt(noise.numel()) and abs(noise.double().std() - 1) < 0.02
    labels = {"op": "q_sample", "impl": impl, "phase": "step", "shape": f"{shape} {dtype}"}
    measure(runs, **labels, dtype=x0.dtype, bytes=size, flops=0)


@cases("shape, dtype, impl", CASES, decides)
def test_step(measure, rotated, smoke, device, shape, dtype, impl):
    shape, form = SMALL if smoke else shape, compiled(eager_step, device, smoke or impl != "compiled")
    size = 3 * math.prod(SHAPES[shape]) * getattr(torch, dtype).itemsize
    sets = rotated(
        lambda: step_inputs(SHAPES[shape], device, getattr(torch, dtype), same_row=impl == "diffusers"), size
    )
    x_t, output, c = sets[0][:3]
    expected = step(x_t.float(), output.float(), c, impl="reference")
    step(x_t, output, c, impl="native")
    runs = [step_runs(*inputs, form)[impl] for inputs in sets]
    assert (runs[0]().float() - expected).norm() <= (1e-4 if dtype == "float32" else 5e-2) * expected.norm()
    labels = {"op": "step", "impl": impl, "phase": "step", "shape": f"{shape} {dtype}"}
    measure(runs, **labels, dtype=x_t.dtype, bytes=size, flops=0)


def main() -> None:
    """Milliseconds of each form at 4096x3x16x16 float32: the variants take turns, the least of many counts."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    x, past_cache = torch.randn(4096, 3, 16, 16), torch.ones(2**26)
    inputs, same, copied = step_inputs(x.shape, "cpu", torch.float32), torch.empty_like(x), torch.empty_like(past_cache)
    forms = {
        "q_sample": q_sample_runs(x, torch.randint(len(ALPHA_BAR), (len(x),))),
        "step": step_runs(*inputs),
        "copy": {"same size": lambda: same.copy_(x), "past every cache": lambda: copied.copy_(past_cache)},
    }
    runs = {
        (op, name): f for op, fs in forms.items() for name, f in fs.items() if name not in ("compiled", "diffusers")
    }
    best = dict.fromkeys(runs, math.inf)
    for _ in range(60):
        for key, run in runs.items():
            begin = time.perf_counter()
            made = run()
            best[key] = min(best[key], time.perf_counter() - begin)
            del made  # outside the timing, before the next allocates
    print(f"{torch.get_num_threads()} threads, least of 60, milliseconds and GB/s")
    for (op, name), seconds in best.items():
        moved = 2 * past_cache.nbytes if name == "past every cache" else (2 if op == "copy" else 3) * x.nbytes
        print(f"{op:9} {name:17} {1e3 * seconds:7.3f} {moved / seconds / 1e9:6.1f}")


if __name__ == "__main__":
    main()
