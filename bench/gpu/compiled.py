"""Block `compiled`: Inductor's best, each in a process of its own that compiles early and times when it may.

The peers run whole in one CUDA graph too: without it the host would be timed. The published step is compiled whole,
20,000 nodes that take minutes, and block by block: each distinct block once, what lies between as it is.
"""

from collections.abc import Callable

import torch

from bench import published as form
from bench.baselines import fresh_model, published_twin
from bench.clock import captured, repeated, replayed
from bench.gpu import operations
from bench.gpu.lab import Lab
from bench.gpu.steps import advance, ours, profile, published
from bench.published import Published
from encdiff.engine import Graph

Ready = Callable[[], None]


def published_step(lab: Lab, ready: Ready, by_block: bool = False) -> dict:
    """The published step: SDPA, loss compiled, fused AdamW and average, latents at hand, in one graph."""
    if lab.cpu:
        run = published(lab, True, "sdpa", fast=True)
    elif by_block:
        run = published(lab, True, "sdpa", fast=True, prepare=compile_blocks)
    else:
        run = published(lab, True, "sdpa", lambda f: torch.compile(f, dynamic=False), fast=True)
    for _ in range(2):
        run()
    if lab.cpu:
        ready()
        return {"seconds": repeated(run, lab.device)}
    graph, _held = captured(run, [run])
    ready()
    found = {"seconds": repeated(graph.replay, lab.device), "profile": profile(lab, graph.replay)}
    torch.backends.cudnn.benchmark = True
    graph, _held = captured(run, [run])
    return found | {"cudnn.benchmark": repeated(graph.replay, lab.device)}


def compile_blocks(twin: Published) -> None:
    """Each block compiled in place; those of one class and the same shapes share what was compiled."""
    torch._dynamo.config.recompile_limit = 64
    alone = (form.ResBlock, form.SpatialTransformer, form.Bank)
    for block in [*(m for m in twin.modules() if isinstance(m, alone)), twin.cond_stage_model["encoder"]]:
        block.compile(dynamic=False)


def our_step(lab: Lab, ready: Ready, masters: bool = True) -> dict:
    """Our step compiled inside its graph."""
    if lab.cpu:
        ready()
        return {"seconds": repeated(advance(ours(lab, masters=masters, precision="bf16"), lab), lab.device)}
    training = ours(lab, masters=masters, precision="bf16", engine="compile")
    run = advance(training, lab)
    for _ in range(6):
        run()
    ready()
    found = {"seconds": repeated(run, lab.device), "profile": profile(lab, run)}
    torch.backends.cudnn.benchmark, training._run = True, Graph(training._work)
    return found | {"cudnn.benchmark": repeated(run, lab.device)}


def published_unet(lab: Lab, ready: Ready) -> dict:
    """One evaluation of the published U-Net with SDPA, bf16 autocast, compiled, in one graph."""
    unet = published_twin(fresh_model(lab.config, lab.device), "sdpa").unet
    unet = unet if lab.cpu else torch.compile(unet, dynamic=False)
    side = lab.config.image_size // lab.config.downsampling
    x, t = (
        torch.randn(lab.batch, 3, side, side, device=lab.device),
        torch.randint(1000, (lab.batch,), device=lab.device),
    )
    tokens = torch.randn(lab.batch, lab.config.concepts, lab.config.token_width, device=lab.device)

    def run():
        with torch.no_grad(), torch.autocast(lab.device.type, torch.bfloat16, cache_enabled=False):
            return unet(x, t, tokens)

    run()
    ready()
    return {"seconds": replayed(run, lab.device, calls=2)}


def ops(lab: Lab, ready: Ready) -> dict:
    if lab.cpu:
        ready()
        return {}
    return operations.measure_compiled(lab, ready)


PEERS = {
    "published step": published_step,
    "published step by block": lambda lab, ready: published_step(lab, ready, by_block=True),
    "our step": our_step,
    "published U-Net": published_unet,
    "ops": ops,
}


def lines(found: dict) -> list[str]:
    said = []
    for name, r in found.items():
        if isinstance(r, dict) and r.get("error"):
            said.append(f"{name}: {r['error'][:300]}")
        elif isinstance(r, dict) and r.get("seconds"):
            tried = f", with cudnn.benchmark {1e3 * r['cudnn.benchmark']:.2f} ms" if "cudnn.benchmark" in r else ""
            took = f"compiled in {r.get('compile_s', 0):.0f} s"
            said.append(f"{name}, compiled, in a graph: {1e3 * r['seconds']:.2f} ms{tried}; {took}")
            if "profile" in r:
                p = r["profile"]
                said.append(f"  {p['total']['count']:.0f} kernels, {p['total']['us'] / 1e3:.2f} ms busy: " + ", ".join(
                    f"{g} {v['count']:.0f} {v['us']:.0f}us" for g, v in list(p["groups"].items())[:9]))  # fmt: skip
        else:
            said += [
                f"{op:26} compiled us " + " / ".join(f"{1e6 * s:.1f}" for s in t.values())
                for op, t in r.items()
                if isinstance(t, dict)
            ]
    return said
