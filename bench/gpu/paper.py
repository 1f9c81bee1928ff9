"""Block `paper`: the paper's configuration trained on all 480,000 images of the procedural room, against the clock.

One run, or several step by step in turns, each on a CUDA stream of its own; they take as long as one after the other.
The images are coloured on the device from 480 traced views, and checked to be the renderer's own, byte for
byte. Codes of the whole grid are taken at marks; processes of their own score them meanwhile. OUT/paper/RUN has what
one run left.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.gpu.lab import Lab
from bench.gpu.room import SMALL, Room
from encdiff.data import to_float
from encdiff.data.loader import Batches
from encdiff.data.procedural import FACTOR_SIZES
from encdiff.engine import float32_precision
from encdiff.evaluation import counterfactual
from encdiff.models import EncDiff
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.pictures import save_png, swap_grid, true_swaps
from encdiff.training import TrainConfig, Training

# beside the paper's: the clean latents as target, scalars of unit variance, a bank that begins with He's gain (what
# docs/recipes.md found on small models); a higher rate and a short warm-up, more noise, clipping
MODEL = {"prediction": "x0", "normalize_scalars": True, "bank_gain": 2.45}
RECIPE = {
    "steps": 10**6, "learning_rate": 7e-4, "warmup": 300, "betas": (0.9, 0.99), "weight_decay": 0.0,
    "gradient_clip": 1.0, "timesteps": "power", "precision": "bf16",
}  # fmt: skip
DECAY = 0.3  # the last part of the time, over which the rate falls in a line
MARKS = (0.15, 0.3, 0.6)  # parts of the time after which codes are taken
SWAPS = 12  # seconds that the swaps of one run may take


class Variant(NamedTuple):
    """One run: its seed, and what differs from MODEL and RECIPE."""

    seed: int
    model: dict
    recipe: dict


VARIANTS = {
    "seed0": Variant(0, {}, {}),
    "seed1": Variant(1, {}, {}),
    "seed2": Variant(2, {}, {}),
    "uniform": Variant(0, {}, {"timesteps": "uniform"}),  # every noise level alike
    "rate": Variant(0, {}, {"learning_rate": 1.5e-3}),
}


class Run:
    """A training, the order of its images, and what it left so far."""

    def __init__(self, lab: Lab, room: Room, name: str, stage: VQAutoencoder | None, **changes):
        self.lab, self.room, self.name, variant = lab, room, name, VARIANTS[name]
        torch.manual_seed(variant.seed)
        model = EncDiff(replace(lab.config, **MODEL | variant.model)).to(lab.device)
        if stage is not None:
            model.first_stage_model.load_state_dict(stage.state_dict())
        given = RECIPE | {"batch_size": lab.batch, "seed": variant.seed} | variant.recipe | changes
        self.training = Training(model, TrainConfig(**given))
        self.order = Batches(room, self.training.config.batch_size, variant.seed, resident_gib=0)
        self.stream = None if lab.cpu else torch.cuda.Stream()
        self.folder = lab.out / "paper" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scoring: list[tuple[subprocess.Popen, Path]] = []
        self.found: dict = {"config": {k: str(v) for k, v in (MODEL | variant.model | given).items()}, "log": []}

    @property
    def finite(self) -> bool:
        return not self.found["log"] or bool(np.isfinite(self.found["log"][-1][2]))

    def begin(self, latents: Tensor, scaling_factor: float) -> None:
        """Latents of all images, made once for every run."""
        self.training.model.config = replace(self.training.model.config, scaling_factor=scaling_factor)
        self.training.latents = latents

    def advance(self, done: float, now: float) -> None:
        """One step when the share `done` of the time is over, after `now` seconds."""
        t, c = self.training, self.training.config
        t.rate = lambda: c.learning_rate * min(1.0, (t.step + 1) / c.warmup, (1 - done) / DECAY)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            rows = torch.from_numpy(self.order.batch_indices(t.step))
            rows = rows if self.lab.cpu else rows.pin_memory().to(self.lab.device, non_blocking=True)
            terms = t.advance(self.room.pixels[rows], rows)
            if t.step % (2 if self.lab.cpu else 100) == 0:
                self.found["log"].append([t.step, now, float(terms["loss"]), float(terms["gradient_norm"])])

    def score(self, name: str, jobs: int) -> None:
        """Codes as they are, scored by a process of its own."""
        codes = encode(self.training.model, self.room.pixels)
        self.scoring.append(_score(self.folder, codes, name, jobs, SMALL if self.lab.cpu else FACTOR_SIZES))

    def save(self) -> None:
        (self.folder / "paper.json").write_text(json.dumps(self.found, indent=1))

    def swap(self) -> None:
        """Counterfactual accuracy, and swaps.png with the true images beside the swaps."""
        model, room = self.training.averaged_model(), self.room
        self.found["counterfactual"] = found = counterfactual(model, room, pairs=4 if self.lab.cpu else 128)
        self.save()
        sources, targets = room.pairs(5)
        groups = {name: swap["concepts"] for name, swap in found["factors"].items() if swap["concepts"]}
        pairs = (to_float(room.images(rows)).to(self.lab.device) for rows in (sources, targets))
        truth = true_swaps(room, sources, targets, groups)
        save_png(swap_grid(model, *pairs, groups=groups, truth=truth), self.folder / "swaps.png")

    def scores(self, end: float) -> dict:
        """What was scored by `end`; processes that are not done go on, into files beside the others."""
        for process, _ in self.scoring:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
        return {
            path.stem.removeprefix("scores-"): json.loads(path.read_text()) for _, path in self.scoring if path.exists()
        }


def measure(lab: Lab, names: tuple[str, ...], end: float, until: float, ready: Callable[[], None], **changes) -> dict:
    """Train until `end`; by `until`, of each run, losses, images/s, scores at the marks and at the end, swaps.

    `ready` is called when images and latents are made, and returns when training may begin.
    """
    began, room, folder = time.monotonic(), Room(lab), lab.out / "first_stage"
    if not (folder.exists() or lab.cpu):
        raise FileNotFoundError("no first stage: it had too little time, --train is to be longer")
    stage = VQAutoencoder.from_pretrained(folder).to(lab.device) if folder.exists() else None
    runs = [Run(lab, room, name, stage, **changes) for name in names]
    coloured, first = time.monotonic(), runs[0].training
    first.begin(to_float(room.pixels[:: max(1, len(room) // 512)]))
    scaling_factor, latents = first.model.config.scaling_factor, encoded(first.model, room.pixels)
    found = {"coloured_s": coloured - began, "latents_s": time.monotonic() - coloured}
    for run in runs:
        run.begin(latents, scaling_factor)
    ready()
    seconds = max(3.0, end - time.monotonic())
    trained = train(lab, runs, seconds)
    for run in runs:
        run.found |= {"seconds": trained, "steps": run.training.step}
        run.found["images_per_s"] = run.training.step * run.training.config.batch_size / trained
        run.save()
        run.score("final", jobs=4)
    found["runs"] = {run.name: run.found for run in runs}
    lab.save("paper", found)
    for run in runs:
        if lab.cpu or time.monotonic() < until - SWAPS:
            run.swap()
    for run in runs:
        run.found["scores"] = run.scores(until)
        run.save()
    return found


def train(lab: Lab, runs: list[Run], seconds: float) -> float:
    """All of them in turns for so many seconds, without those in which codes are taken; how many it were."""
    marks = [0.5] if lab.cpu else list(MARKS)
    began, now = time.monotonic(), 0.0
    while now < seconds and all(run.finite for run in runs):
        for run in runs:
            run.advance(now / seconds, now)
        if marks and now > marks[0] * seconds:
            before, _ = time.monotonic(), marks.pop(0)
            for run in runs:
                run.score(f"{now:.0f}", jobs=2)
                run.save()
            began += time.monotonic() - before
        now = time.monotonic() - began
    return now


@torch.no_grad()
@float32_precision(tf32=True)
def encoded(model: EncDiff, pixels: Tensor, rows: int = 2048) -> Tensor:
    """Latents float32 of every image, there for whatever stream reads them."""
    latents = torch.cat([model.to_latents(to_float(part)) for part in pixels.split(rows)])
    if latents.is_cuda:
        torch.cuda.synchronize()
    return latents


@torch.no_grad()
@float32_precision(tf32=True)
def encode(model: EncDiff, pixels: Tensor, rows: int = 4096) -> np.ndarray:
    """Scalars float32 (n, N) of every image, in eval mode."""
    if pixels.is_cuda:
        torch.cuda.synchronize()
    model.eval()
    codes = torch.cat([model.encode(to_float(part)) for part in pixels.split(rows)])
    model.train()
    return codes.float().cpu().numpy()


def _score(folder: Path, codes: np.ndarray, name: str, jobs: int, sizes: tuple) -> tuple[subprocess.Popen, Path]:
    """Score codes of the whole grid in a process of its own, into FOLDER/scores-NAME.json."""
    kept, result = folder / f"codes-{name}.npy", folder / f"scores-{name}.json"
    np.save(kept, codes)
    command = [sys.executable, "-m", "bench.gpu.paper", str(kept), str(result), str(jobs), *map(str, sizes)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2]), result


def score(codes: Path, result: Path, jobs: int, sizes: tuple[int, ...]) -> None:
    from encdiff.evaluation.protocol import score_grid, settings_of

    found = score_grid(np.load(codes).astype(np.float64), sizes, settings_of("paper"), n_jobs=jobs)
    part = result.with_suffix(".part")
    part.write_text(json.dumps({"factor_vae": found["factor_vae"], "dci": found["dci"]}, default=lambda a: a.tolist()))
    part.replace(result)


def lines(found: dict) -> list[str]:
    said = [f"images coloured in {found['coloured_s']:.1f} s, latents of all in {found['latents_s']:.1f} s"]
    for name, run in found.get("runs", {}).items():
        log = run["log"]
        losses = ", ".join(f"{loss:.4f} at {s:.0f} s" for _, s, loss, _ in log[:: max(1, len(log) // 5)])
        said.append(f"{name}: {run['steps']} steps, {run['images_per_s']:.0f} images/s; loss {losses}")
        for mark, s in run.get("scores", {}).items():
            d = s["dci"]
            said.append(
                f"  {mark}: FactorVAE {s['factor_vae']['eval_accuracy']:.4f}, DCI {d['disentanglement']:.4f}, "
                f"completeness {d['completeness']:.4f}, informativeness {d['informativeness_test']:.4f}"
            )
        if rates := run.get("counterfactual"):
            said.append("  " + ", ".join(f"{k} {v:.2f}" for k, v in rates.items() if isinstance(v, float)))
    return said


if __name__ == "__main__":
    score(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), tuple(map(int, sys.argv[4:])))
