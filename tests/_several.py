"""Work that comes out the same in one process and in several, for `tests/test_distributed.py`.

torchrun --nproc-per-node N tests/_several.py OUT NAME...     # each process writes OUT/NAME-RANK.pt
python tests/_several.py --processes N OUT NAME...            # the same of forks, which share what is imported
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # the first optimiser of each fork would

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent))
from _tiny import TINY

from encdiff import EncDiff, TrainConfig, evaluate, open_dataset, train
from encdiff.distributed.batch_norm import batch_norm
from encdiff.distributed.processes import joined, processes
from encdiff.distributed.rows import shared_rows
from encdiff.errors import InputError
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.training import AutoencoderTrainConfig, train_autoencoder
from encdiff.training.loop import share_start
from encdiff.training.step import Training

DATA = "procedural:3,2,3,2,2,2"
RECIPE = TrainConfig(
    steps=20, batch_size=8, learning_rate=1e-3, warmup=5, decay=0.3, gradient_clip=1.0, ema=0.99, seed=3,
    log_every=1, checkpoint_every=1000, picture_every=1000,
)  # fmt: skip
VQ = dict(first_stage="vq", vq_width=32, vq_multipliers=(1,), vq_depth=1, vq_codes=16)


def run(folder: Path, resume: bool = False, model: dict | None = None, **changes) -> dict:
    """Losses of a training, the indices that this process read, and what the run ended with."""
    seen, losses, data = [], [], open_dataset(DATA, 16)
    torch.manual_seed(processes().rank)  # the first process's weights count
    network = EncDiff(replace(TINY, normalize_scalars=True, **(model or {})))
    advance = Training.advance

    def watched(training: Training, images: torch.Tensor, indices: torch.Tensor) -> dict:
        terms = advance(training, images, indices)
        seen.append(indices.clone())
        losses.append(float(terms["loss"]))
        return terms

    Training.advance = watched
    try:
        averaged = train(network, data, folder, replace(RECIPE, **changes), resume=resume)
    finally:
        Training.advance = advance
    weights = {f"model.{k}": v for k, v in network.state_dict().items()}
    weights |= {f"average.{k}": v for k, v in averaged.state_dict().items()}
    scale = network.config.scaling_factor
    return {"losses": torch.tensor(losses), "indices": torch.stack(seen), "scale": scale} | weights


def training(out: Path) -> dict:
    return run(out / "run")


def long(out: Path) -> dict:
    """To be killed: a checkpoint every few steps."""
    run(out / "long", steps=400, checkpoint_every=7)
    return {}


def parts(out: Path) -> dict:
    """In parts, with a first stage whose latents are kept."""
    return run(out / "parts", accumulate=2, steps=6, model=VQ)


def shards(out: Path) -> dict:
    """In shards, whole, and in shards again, in parts; in one process always whole."""
    runs = [
        run(out / "shards", shard=steps != 4, steps=steps, accumulate=2, decay=0.0, resume=steps > 2)
        for steps in (2, 4, 6)
    ]
    averages = {name: value for name, value in runs[-1].items() if name.startswith("average.")}
    return {"losses": torch.cat([one["losses"] for one in runs])} | averages


def masters(out: Path) -> dict:
    found = {}
    for accumulate in (1, 2):
        torch.manual_seed(0)
        recipe = replace(RECIPE, precision="bf16", batch_size=8, accumulate=accumulate)
        ours, data = Training(EncDiff(TINY), recipe, masters=True), open_dataset(DATA, 16)
        losses = []
        for step in range(4):
            indices = torch.arange(8 * step, 8 * step + 8)[ours.share.rows(8)]
            losses.append(float(ours.advance(torch.from_numpy(data.images(indices.numpy())), indices)["loss"]))
        found |= {f"losses{accumulate}": torch.tensor(losses)}
        found |= {f"master{accumulate}.{i}": s.master for i, (s, _) in enumerate(ours.masters.segments)}
    return found


def resumed(out: Path) -> dict:
    """From a checkpoint of another number of processes, which lies in OUT/begun; another place for each number."""
    return run(out / "begun", resume=True, steps=8, decay=0.0)


def first_stage(out: Path) -> dict:
    torch.manual_seed(processes().rank)
    model = VQAutoencoder(width=32, multipliers=(1, 2), depth=1, codebook_size=16)
    config = AutoencoderTrainConfig(steps=4, batch_size=4, disc_layers=1, log_every=1, seed=1)
    train_autoencoder(model, open_dataset(DATA, 16), out / "first-stage", config)
    return {name: value.clone() for name, value in model.state_dict().items()}


def scores(out: Path) -> dict:
    torch.manual_seed(0)
    model = EncDiff(TINY).eval()
    found = evaluate(model, open_dataset(DATA, 16), metrics=["factor_vae"], seeds=3, batch_size=32)
    return {k: v for k, v in found.items() if k != "seconds"}


def norm(out: Path) -> dict:
    """Batch norm of this process's rows of (12, 3, 5, 7), and the gradients of a sum of cubes."""
    generator = torch.Generator().manual_seed(5)
    x = 1000 + torch.randn(12, 3, 5, 7, generator=generator)
    weight, bias = (torch.randn(3, generator=generator).requires_grad_() for _ in range(2))
    own = slice(*processes().part(12))
    x = x[own].clone().requires_grad_()
    y, mean, variance = batch_norm(x, weight, bias)
    y.pow(3).sum().backward()
    return {"y": y, "mean": mean, "variance": variance, "dx": x.grad, "dw": weight.grad, "db": bias.grad}


def rows(out: Path) -> dict:
    """Rows that the processes of a machine fill together; and what fails in one fails in all, in the same words."""
    everyone, calls = processes(), []

    def fill(part: np.ndarray, start: int) -> None:
        calls.append((start, len(part)))
        part[:] = np.arange(start, start + len(part))[:, None]

    found = shared_rows((23, 2), np.int32, fill, everyone, 4)
    whole = bool((found == np.arange(23)[:, None]).all())

    def fails() -> None:
        if everyone.rank == everyone.size - 1:
            raise InputError("the last one cannot")

    def other_model() -> None:  # of another shape, too, which must not be sent
        share_start({"depth": 1 + everyone.rank}, RECIPE, [torch.nn.Linear(9 - everyone.rank, 2)], everyone)

    said = []
    for attempt in (
        lambda: everyone.together(fails),
        lambda: everyone.same(steps=5, batch=everyone.rank),
        other_model,
    ):
        try:
            attempt()
        except InputError as error:
            said.append(str(error))
    mean = torch.tensor([float(everyone.rank), 1.0])
    everyone.mean_(mean)
    told, says = everyone.by_first(lambda: everyone.rank), everyone.says(InputError("what both meet"))
    return {"whole": whole, "calls": calls, "said": said, "mean": mean.tolist(), "told": told, "says": says,
            "gathered": everyone.gather(everyone.rank)}  # fmt: skip


WORK: dict[str, Callable[[Path], dict]] = {
    work.__name__: work for work in (training, long, parts, shards, masters, resumed, first_stage, scores, norm, rows)
}


def main(out: Path, names: list[str]) -> None:
    with joined() as everyone:
        for name in names:
            torch.save(WORK[name](out), out / f"{name}-{everyone.rank}.pt")


def fork(count: int, out: Path, names: list[str]) -> int:
    """As torchrun starts them; 1 if one failed."""
    torch.set_num_threads(1)  # threads do not survive a fork
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    forks = multiprocessing.get_context("fork")
    started = []
    for rank in range(count):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append(forks.Process(target=main, args=(out, names)))
        started[-1].start()
    [process.join() for process in started]
    return int(any(process.exitcode for process in started))


if __name__ == "__main__":
    if sys.argv[1] == "--processes":
        sys.exit(fork(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
    main(Path(sys.argv[1]), sys.argv[2:])
