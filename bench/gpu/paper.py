"""Block `paper`: the paper's configuration trained on all 480,000 images of the procedural room, against the clock.

The images are coloured on the device from 480 traced views, and checked to be the renderer's own, byte for byte.
Codes of the whole grid are taken at marks; processes of their own score them meanwhile.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.gpu.lab import Lab
from encdiff.data import to_float
from encdiff.data.loader import Batches
from encdiff.data.procedural import FACTOR_SIZES, SHAPES, ProceduralShapes3D, factor_labels, render, view
from encdiff.engine import Graph
from encdiff.evaluation import counterfactual
from encdiff.files.temporaries import atomic_path
from encdiff.models import EncDiff
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.pictures import save_png, swap_grid, true_swaps
from encdiff.training import AutoencoderTrainConfig, TrainConfig, Training
from encdiff.training.autoencoder import AutoencoderTraining

SMALL = (2, 2, 2, 2, 4, 3)  # the grid without a GPU
# beside the paper's: the clean latents as target, scalars of unit variance, a bank that begins with He's gain (what
# docs/recipes.md found on small models); a higher rate and a short warm-up, more noise, clipping
MODEL = {"prediction": "x0", "normalize_scalars": True, "bank_gain": 2.45}
RECIPE = {
    "steps": 10**6, "learning_rate": 7e-4, "warmup": 300, "betas": (0.9, 0.99), "weight_decay": 0.0,
    "gradient_clip": 1.0, "timesteps": "power", "precision": "bf16",
}  # fmt: skip
DECAY = 0.3  # the last part of the time, over which the rate falls in a line
MARKS = (30.0, 60.0, 90.0, 150.0, 240.0)  # seconds of training after which codes are taken


class Room(ProceduralShapes3D):
    """The procedural room with every image in memory: `pixels` uint8 (n, S, S, 3) on the device."""

    def __init__(self, lab: Lab):
        super().__init__(lab.config.image_size, SMALL if lab.cpu else FACTOR_SIZES)
        if lab.cpu:
            self.pixels = torch.from_numpy(super().images(np.arange(len(self))))
        else:
            self.pixels = coloured(lab.device, self.image_size, lab.caches / "views.npy")
            some = np.random.default_rng(0).integers(len(self), size=256)
            if not np.array_equal(self.images(some), render(self.factors(some), self.image_size)):
                raise AssertionError("images coloured on the device differ from the renderer's")

    def images(self, indices) -> np.ndarray:
        return self.pixels[torch.as_tensor(np.asarray(indices))].cpu().numpy()


def traced(size: int, kept: Path) -> np.ndarray:
    """Every view of the room, uint8 (480, S*S, 4); traced by all cores, or as `kept` has it."""
    if not kept.exists():
        labels = factor_labels()
        asked = [(s, SHAPES[int(k)], o, size) for s in labels[3] for k in labels[4] for o in labels[5]]
        with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
            views = np.stack(list(pool.map(view, *zip(*asked, strict=True), chunksize=8)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(kept) as temporary:
            np.save(temporary, views)
    return np.load(kept)


def coloured(device: torch.device, size: int, kept: Path) -> Tensor:
    """Every image of the full grid, uint8 (480000, S, S, 3), in the data set's order."""
    labels = factor_labels()
    views = torch.from_numpy(traced(size, kept).astype(np.float32)).to(device)
    hues = _palette(labels[0]).to(device)
    white = torch.full((1, 3), 255.0, device=device)
    out = torch.empty(1000, len(views), size * size, 3, dtype=torch.uint8, device=device)
    for n in range(1000):  # whole numbers below 2**24: exact in any order of summation
        colours = torch.cat([hues[[n // 100, n // 10 % 10, n % 10]], white])
        total = (views[..., None] * colours).sum(2)
        out[n] = (total / 255 + 0.5).clamp(max=255).to(torch.uint8)
    return out.view(-1, size, size, 3)


def _palette(hues: np.ndarray) -> Tensor:
    import colorsys

    from encdiff.data.procedural import SATURATION, VALUE

    return torch.tensor([[round(255 * v) for v in colorsys.hsv_to_rgb(h, SATURATION, VALUE)] for h in hues]).float()


def first_stage(lab: Lab, seconds: float) -> dict:
    """A VQ autoencoder of the paper's shape, trained for so long on L1 and its codebook; kept in OUT/first_stage."""
    torch.manual_seed(0)
    room, c = Room(lab), lab.config
    model = VQAutoencoder(c.vq_width, c.vq_multipliers, c.vq_depth, codebook_size=c.vq_codes).to(lab.device)
    batch, rate = (4 if lab.cpu else 128), 6e-4
    config = AutoencoderTrainConfig(
        batch_size=batch, learning_rate=rate, discriminator=False, precision="float32" if lab.cpu else "bf16"
    )
    training = AutoencoderTraining(model.to(memory_format=torch.channels_last), config)
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return room.pixels[torch.randint(len(room), (batch,), generator=generator).to(lab.device)]

    training.begin(to_float(torch.cat([draw() for _ in range(4)])))
    step, learning_rate = graphed(training, lab)
    began, log, steps, done = time.monotonic(), [], 0, 0.0
    while done < 1:
        learning_rate.fill_(rate * min(1.0, (steps + 1) / 100, 2.5 * (1 - done) + 0.02))  # falls over the last part
        l1, used = step(images=draw())
        steps += 1
        if steps % 100 == 0 or lab.cpu:
            log.append([steps, time.monotonic() - began, float(l1), float(used)])
        done = (time.monotonic() - began) / seconds
    log.append([steps, time.monotonic() - began, float(l1), float(used)])
    model.eval().save_pretrained(lab.out / "first_stage")
    training.picture(to_float(torch.cat([draw()[:8]])), lab.out)
    lab.save("first_stage", {"log": log, "batch": batch, "seconds": seconds})
    return {"steps": steps, "l1": log[-1][2], "codes_used": log[-1][3]}


def graphed(training: AutoencoderTraining, lab: Lab) -> tuple[Callable[..., tuple[Tensor, Tensor]], Tensor]:
    """A step of the autoencoder alone, on a GPU one graph; and its learning rate, on the device."""
    rate = torch.zeros((), device=lab.device)
    parameters = list(training.model.parameters())
    optimizer = torch.optim.Adam(parameters, rate, (0.5, 0.9), capturable=not lab.cpu, fused=not lab.cpu)

    def work(images: Tensor) -> tuple[Tensor, Tensor]:
        optimizer.zero_grad(set_to_none=True)
        with training._autocast():
            terms, _ = training._autoencoder_terms(to_float(images), judge=None)
        terms["loss"].backward()
        optimizer.step()
        return terms["l1"].detach(), terms["codes_used"]

    return (work if lab.cpu else Graph(work)), rate


def measure(lab: Lab, end: float, ready: Callable[[], None], **changes) -> dict:
    """Train until `end`; losses, images/s, scores at the marks, a swap grid, codes of the last.

    `ready` is called when images and latents are made, and returns when training may begin.
    """
    torch.manual_seed(0)
    room, model = Room(lab), EncDiff(replace(lab.config, **MODEL)).to(lab.device)
    folder = lab.out / "first_stage"
    if not (folder.exists() or lab.cpu):
        raise FileNotFoundError("no first stage: it had too little time, --train is to be longer")
    if folder.exists():
        stage = VQAutoencoder.from_pretrained(folder).to(lab.device)
        model.first_stage_model.load_state_dict(stage.state_dict())
    given = RECIPE | {"batch_size": lab.batch} | changes
    config = TrainConfig(**given)
    training = Training(model, config)
    batches = Batches(room, config.batch_size, 0, resident_gib=20.0, device=lab.device)
    training.begin(to_float(batches.images(0)))
    prepared = time.monotonic()
    training.prepare(batches)
    encoded = time.monotonic()
    ready()
    seconds = max(3.0, end - time.monotonic())
    marks = [0.5] if lab.cpu else list(MARKS)
    began, log, scoring, encoding = time.monotonic(), [], [], 0.0
    found = {
        "config": {k: str(v) for k, v in (MODEL | given).items()},
        "prepare_s": encoded - prepared,
        "log": log,
        "seconds": seconds,
    }
    now = 0.0
    training.rate = lambda: (
        config.learning_rate * min(1.0, (training.step + 1) / config.warmup, (1 - now / seconds) / DECAY)
    )
    while (now := time.monotonic() - began - encoding) < seconds:
        terms = training.advance(*batches.batch(training.step))
        if training.step % (2 if lab.cpu else 100) == 0:
            loss = float(terms["loss"])
            log.append([training.step, now, loss, float(terms["gradient_norm"])])
            if not np.isfinite(loss):
                break
            if marks and now > marks[0] and (lab.cpu or seconds - now > 8):
                mark, before = marks.pop(0), time.monotonic()
                scoring.append(_score(lab, encode(model, room.pixels), f"{mark:.0f}"))
                encoding += time.monotonic() - before
                lab.save("paper", found)
    found |= {"steps": training.step, "images_per_s": training.step * config.batch_size / now}
    lab.save("paper", found)
    codes = encode(model, room.pixels)
    last = _score(lab, codes, "final", jobs=6)
    found["counterfactual"] = swaps(training.averaged_model(), room, lab)
    lab.save("paper", found)
    for process, _ in [*scoring, last]:  # the last goes on: what it finds lies beside the other results
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, end + (60 if lab.cpu else 8) - time.monotonic()))
    found["scores"] = {
        path.stem.removeprefix("scores-"): json.loads(path.read_text()) for _, path in [*scoring, last] if path.exists()
    }
    return found


def swaps(model: EncDiff, room: Room, lab: Lab) -> dict:
    """Counterfactual accuracy, and OUT/swaps.png with the true images beside the swaps."""
    found = counterfactual(model, room, pairs=4 if lab.cpu else 128)
    sources, targets = room.pairs(5)
    groups = {name: swap["concepts"] for name, swap in found["factors"].items() if swap["concepts"]}
    pairs = (to_float(room.images(rows)).to(lab.device) for rows in (sources, targets))
    truth = true_swaps(room, sources, targets, groups)
    save_png(swap_grid(model, *pairs, groups=groups, truth=truth), lab.out / "swaps.png")
    return found


@torch.no_grad()
def encode(model: EncDiff, pixels: Tensor, rows: int = 4096) -> np.ndarray:
    """Scalars float32 (n, N) of every image, in eval mode."""
    model.eval()
    codes = torch.cat([model.encode(to_float(part)) for part in pixels.split(rows)])
    model.train()
    return codes.float().cpu().numpy()


def _score(lab: Lab, codes: np.ndarray, name: str, jobs: int = 2) -> tuple[subprocess.Popen, Path]:
    """Score codes of the whole grid in a process of its own, into OUT/scores-NAME.json."""
    kept, result = lab.out / f"codes-{name}.npy", lab.out / f"scores-{name}.json"
    np.save(kept, codes)
    sizes = SMALL if lab.cpu else FACTOR_SIZES
    command = [sys.executable, "-m", "bench.gpu.paper", str(kept), str(result), str(jobs), *map(str, sizes)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2]), result


def score(codes: Path, result: Path, jobs: int, sizes: tuple[int, ...]) -> None:
    from encdiff.evaluation.protocol import score_grid, settings_of

    found = score_grid(np.load(codes).astype(np.float64), sizes, settings_of("paper"), n_jobs=jobs)
    part = result.with_suffix(".part")
    part.write_text(json.dumps({"factor_vae": found["factor_vae"], "dci": found["dci"]}, default=lambda a: a.tolist()))
    part.replace(result)


def lines(found: dict) -> list[str]:
    log = found["log"]
    said = [f"{found.get('steps', log[-1][0] if log else 0)} steps, {found.get('images_per_s', 0):.0f} images/s, "
            f"latents of all images in {found['prepare_s']:.1f} s; loss " + ", ".join(
                f"{loss:.4f} at {s:.0f} s" for _, s, loss, _ in log[:: max(1, len(log) // 6)])]  # fmt: skip
    for name, s in found.get("scores", {}).items():
        dci = s["dci"]["disentanglement"]
        said.append(f"{name}: FactorVAE {s['factor_vae']['eval_accuracy']:.4f}, DCI {dci:.4f}")
    if rates := found.get("counterfactual"):
        said.append(", ".join(f"{k} {v:.2f}" for k, v in rates.items() if isinstance(v, float)))
    return said


if __name__ == "__main__":
    score(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), tuple(map(int, sys.argv[4:])))
