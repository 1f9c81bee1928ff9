"""Blocks `step` and `profile`: one training step of the paper's configuration, and what its graph is made of.

Images are at hand on the device. `latents`: made once for the whole run, as `encdiff train` does where they fit.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from bench.baselines import fresh_model, published_twin
from bench.clock import Run, called, captured, repeated
from bench.cost import train_step_cost
from bench.gpu.lab import Lab
from bench.published import Published, PublishedTraining
from encdiff.engine import float32_precision
from encdiff.training import TrainConfig, Training

RATE = 1e-6


def images_of(lab: Lab) -> Tensor:
    """uint8 (B, S, S, 3)."""
    size = lab.config.image_size
    return torch.randint(256, (lab.batch, size, size, 3), dtype=torch.uint8, device=lab.device)


def ours(
    lab: Lab, latents: bool = True, masters: bool | None = None, aside: bool = True, rate: float = RATE, **options
) -> Training:
    """Our training, about to take a step; `options` are TrainConfig's."""
    config = TrainConfig(batch_size=lab.batch, learning_rate=rate, warmup=0, **options)
    training = Training(fresh_model(lab.config, lab.device).train(), config, masters, aside)
    if latents:
        training.latents = torch.randn(lab.batch, *training.model.latent_shape, device=lab.device)
    return training


def advance(training: Training, lab: Lab) -> Run:
    images, indices = images_of(lab), torch.arange(lab.batch, device=lab.device)
    return lambda: training.advance(images, indices)


def published(
    lab: Lab, latents: bool, attention: str = "einsum", compile: Callable = lambda f: f, fast=False, capturable=False,
    prepare: Callable[[Published], None] = lambda twin: None,
) -> Run:  # fmt: skip
    """The published step, bf16 autocast; `latents`: with the first stage's work left out, as ours."""
    twin = published_twin(fresh_model(lab.config, lab.device).train(), attention)
    prepare(twin)
    if latents:
        x0 = torch.randn(
            lab.batch, twin.first_stage_model.channels, *[lab.config.image_size // lab.config.downsampling] * 2
        )
        x0 = x0.to(lab.device)
        twin.first_stage_model.encode = lambda images: x0
    training = PublishedTraining(
        twin, RATE, compile(twin.loss), "bf16", fast=fast, capturable=(fast or capturable) and not lab.cpu
    )
    size = lab.config.image_size
    images = torch.rand(lab.batch, 3, size, size, device=lab.device) * 2 - 1

    def run() -> Tensor:
        with float32_precision(tf32=True):  # what is left of it, as in ours
            return training.advance(images)

    return run


def variants(lab: Lab) -> dict[str, Callable[[], float]]:
    """name -> seconds of a step of ours."""
    on, graph = lab.device, "eager" if lab.cpu else "graph"

    def steps(**options) -> float:
        return repeated(advance(ours(lab, **options), lab), on)

    packed = {"masters": True, "precision": "bf16", "engine": graph}
    return {
        "ours graph, bf16 weights": lambda: steps(**packed),
        "ours graph, bf16 weights, one stream": lambda: steps(**packed, aside=False),
        "ours graph, bf16 weights, encoding": lambda: steps(**packed, latents=False),
        "ours graph, autocast": lambda: steps(masters=False, precision="bf16", engine=graph),
        "ours graph, tf32": lambda: steps(precision="tf32", engine=graph),
        "ours graph, float32": lambda: steps(precision="float32", engine=graph),
    }


def others(lab: Lab) -> dict[str, Callable[[], float]]:
    """The published form, and ours without a graph: what the host decides, so all must be quiet."""
    on = lab.device

    def eager(run: Run) -> float:
        return called(run, on, calls=6, warm_up=2)

    def in_a_graph() -> float:
        run = published(lab, latents=True, capturable=True)
        if lab.cpu:
            return eager(run)
        graph, _held = captured(run, [run])
        return repeated(graph.replay, on, warm_up=2)

    return {
        "published, latents at hand, in a graph": in_a_graph,
        "published, latents at hand": lambda: eager(published(lab, latents=True)),
        "published": lambda: eager(published(lab, latents=False)),
        "ours eager, bf16 weights": lambda: eager(
            advance(ours(lab, masters=True, precision="bf16", engine="eager"), lab)
        ),
    }


def measure(lab: Lab) -> dict:
    bound = train_step_cost(lab.config, lab.batch, torch.bfloat16, first_stage=False)
    return time_all(lab, "step", variants(lab), {"batch": lab.batch, "bound": bound})


def measure_published(lab: Lab) -> dict:
    return time_all(lab, "published", others(lab), {"batch": lab.batch})


def time_all(lab: Lab, block: str, runs: dict[str, Callable[[], float]], found: dict) -> dict:
    """`found` with the seconds of each, saved as they come."""
    found["seconds"] = {}
    for name, run in runs.items():
        try:
            found["seconds"][name] = run()
        except Exception as error:
            if type(error).__name__ == "Late":
                raise
            found["seconds"][name] = None
            found.setdefault("errors", {})[name] = f"{type(error).__name__}: {str(error).strip()[:400]}"
        lab.save(block, found)
        if not lab.cpu:
            torch.cuda.empty_cache()
    return found


def lines(found: dict) -> list[str]:
    return [
        f"{name:42} {1e3 * seconds:8.2f} ms" if seconds else f"{name:42} FAILED {found['errors'][name]}"
        for name, seconds in found["seconds"].items()
    ]


# ---- what the graph is made of

GROUPS = {  # the first pattern that a kernel's name matches
    "adamw": r"adamw|Adam|multi_tensor",
    "cross-attention": r"cross_attention",
    "self-attention": r"self_attention|flash|fmha|attention",
    "MLP bank": r"mlp_bank",
    "GroupNorm": r"group_norm|GroupNorm",
    "LayerNorm": r"layer_norm|LayerNorm",
    "residual sums": r"residual_add",
    "GEGLU": r"geglu",
    "resampling": r"resample|avg_pool|upsample",
    "BatchNorm": r"batch_norm|bn_fw|bn_bw|BatchNorm",
    "convolutions": r"conv|xmma_(fprop|dgrad|wgrad)|implicit|fprop|dgrad|wgrad|nhwc|cudnn",
    "products": r"projection|gemm|cutlass|cublas|nvjet|gemv|splitK|sm90_xmma",
    "noise": r"q_sample|step_kernel|draw_kernel",
    "Inductor": r"triton_(poi|red|per|tem)",
    "reductions": r"reduce_kernel|Reduce|column_sum",
    "concatenations": r"CatArray",
    "copies and casts": r"copy|Memcpy|direct_copy|bfloat16_copy",
    "fills": r"Fill|Memset",
    "elementwise": r"elementwise",
}


def group_of(kernel: str) -> str:
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel)), "other")


def profile(lab: Lab, run: Run, replays: int = 3) -> dict:
    """Kernels of one call: by name and by group, launches and microseconds."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as traced

    for _ in range(6):
        run()
    kinds = [ProfilerActivity.CPU] if lab.cpu else [ProfilerActivity.CUDA]
    with traced(activities=kinds) as trace:
        for _ in range(replays):
            run()
        if not lab.cpu:
            torch.cuda.synchronize()
    rows: dict[str, list[float]] = {}
    for event in trace.events():
        on_device = str(event.device_type).endswith("CUDA")
        if not lab.cpu and not on_device:
            continue
        row = rows.setdefault(event.name, [0, 0.0])
        row[0] += 1
        row[1] += event.device_time if not lab.cpu else event.cpu_time
    kernels = [
        {"kernel": k[:160], "count": n / replays, "us": us / replays, "group": group_of(k)}
        for k, (n, us) in rows.items()
    ]
    kernels.sort(key=lambda r: -r["us"])
    groups: dict[str, dict] = {}
    for row in kernels:
        group = groups.setdefault(row["group"], {"count": 0.0, "us": 0.0})
        group["count"] += row["count"]
        group["us"] += row["us"]
    groups = dict(sorted(groups.items(), key=lambda item: -item[1]["us"]))
    total = {"count": sum(g["count"] for g in groups.values()), "us": sum(g["us"] for g in groups.values())}
    return {"total": total, "groups": groups, "kernels": kernels[:220]}


def measure_profile(lab: Lab) -> dict:
    engine = "eager" if lab.cpu else "graph"
    found = {}
    for name, aside in (("bf16 weights", True), ("bf16 weights, one stream", False)):
        training = ours(lab, masters=True, aside=aside, precision="bf16", engine=engine)
        found[name] = profile(lab, advance(training, lab))
        lab.save("profile", found)
    return found


def profile_lines(found: dict) -> list[str]:
    said = []
    for name, p in found.items():
        said.append(f"{name}: {p['total']['count']:.0f} kernels, {p['total']['us'] / 1e3:.2f} ms busy")
        said += [f"  {g:18} {v['count']:6.0f} {v['us']:8.0f} us" for g, v in list(p["groups"].items())[:18]]
        said += [f"    {r['us']:7.0f} us {r['count']:5.0f} {r['kernel'][:90]}" for r in p["kernels"][:14]]
    return said
