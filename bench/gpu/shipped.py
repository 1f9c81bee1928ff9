"""Block `shipped`: models that may come with the package, several seeds of each trained at once.

Each is a run of a preset as `encdiff train` would make it, but on a CUDA stream of its own: kernels of so small models
leave most of the device idle, so that several runs take hardly longer than one. Rates follow the clock, not the steps.
OUT/shipped/PRESET-SEED is a folder that `EncDiff.from_pretrained` reads, its weights rounded to float16.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.gpu.lab import Lab
from encdiff.data import Dataset, open_dataset, to_float
from encdiff.data.loader import Batches
from encdiff.models import EncDiff, EncDiffConfig
from encdiff.training import TrainConfig, Training

PLAN = (("room32", 0), ("room32", 1), ("room32", 2), ("room64", 0), ("room64", 1))
GRID = "procedural:5,5,5,4,4,5"
READY = 8  # steps before the clock starts: kernels are compiled, graphs captured


class Run(NamedTuple):
    name: str
    training: Training
    batches: Batches
    stream: "torch.cuda.Stream | None"
    log: list[list[float]]  # step, seconds, loss

    def advance(self, done: float, now: float, every: int) -> None:
        """One step when the share `done` of the time is over."""
        t, c = self.training, self.training.config
        t.rate = lambda: c.learning_rate * min(1.0, (t.step + 1) / c.warmup, (1 - done) / c.decay)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            terms = t.advance(*self.batches.batch(t.step))
            if t.step % every == 0:
                self.log.append([t.step, now, float(terms["loss"])])


def begin(lab: Lab, preset: str, seed: int, data: dict[int, Dataset]) -> Run:
    torch.manual_seed(seed)
    config, recipe = EncDiffConfig.from_preset(preset), TrainConfig.from_preset(preset, seed=seed)
    if lab.cpu:
        config, recipe = replace(config, width=16, encoder_width=8, groups=8), replace(recipe, batch_size=4)
    else:
        recipe = replace(recipe, precision="bf16")
    size = config.image_size
    if size not in data:
        data[size] = open_dataset("procedural:2,2,2,2,2,2" if lab.cpu else GRID, image_size=size)
    training = Training(EncDiff(config).to(lab.device), recipe)
    batches = Batches(data[size], recipe.batch_size, seed, device=lab.device)
    training.begin(to_float(batches.images(0)))
    return Run(f"{preset}-{seed}", training, batches, None if lab.cpu else torch.cuda.Stream(), [])


def measure(lab: Lab, ready, seconds: float) -> dict:
    """`ready` returns when the device is free; then all are trained for so many seconds."""
    data: dict[int, Dataset] = {}
    runs = [begin(lab, preset, seed, data) for preset, seed in (PLAN[::3] if lab.cpu else PLAN)]
    if not lab.cpu:
        torch.cuda.synchronize()
    for run in runs:
        for _ in range(1 if lab.cpu else READY):
            run.advance(0.0, 0.0, every=10**9)
    ready()
    began = time.monotonic()
    while (now := time.monotonic() - began) < seconds:
        for run in runs:
            run.advance(now / seconds, now, every=1 if lab.cpu else 200)
    found: dict[str, dict] = {}
    for run in runs:
        if run.stream:
            run.stream.synchronize()
        folder = lab.out / "shipped" / run.name
        run.training.save_model(folder)
        halve(folder / "model.safetensors")
        found[run.name] = {"steps": run.training.step, "batch": run.training.config.batch_size, "log": run.log}
    return {"seconds": seconds, "grid": GRID, "runs": found}


def halve(path) -> None:
    """Weights in float16: half the file; what is not floating point stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in load_file(path).items()}
    save_file(tensors, path, metadata)


def lines(found: dict) -> list[str]:
    return [
        f"{name}: {r['steps']} steps of {r['batch']} in {found['seconds']:.0f} s, loss "
        + ", ".join(f"{loss:.4f} at {s:.0f} s" for _, s, loss in r["log"][:: max(1, len(r["log"]) // 5)])
        for name, r in found.get("runs", {}).items()
    ]
