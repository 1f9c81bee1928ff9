"""The CPU's figures: all forms in turns in one run, the median and the least time of each.

    OMP_NUM_THREADS=2 python -m bench.cpu [seconds]

The paper's configuration, batch 16: its widest cross-attention, one evaluation of the U-Net, one training step;
`published` is `bench.published`. All forms are called in turns until the times of each have settled; after how many
calls they had stands beside them. On a fresh machine the first ten steps of a training took ten times as long as later
ones.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable

import torch

from bench.baselines import PAPER, fresh_model, published_twin
from bench.bench_cross_attention import OPS, inputs
from bench.clock import warm_up
from bench.published import PublishedTraining
from encdiff.data import to_float
from encdiff.models import EncDiff
from encdiff.training import TrainConfig, Training

BATCH = 16
SETTLING, ROUNDS = 300.0, 5  # seconds of warming up at most, rounds at least


def in_turns(title: str, forms: dict[str, Callable], seconds: float) -> None:
    before = dict(zip(forms, warm_up(list(forms.values()), SETTLING), strict=True))
    taken, end = {name: [] for name in forms}, time.monotonic() + seconds
    while time.monotonic() < end or len(taken["published"]) < ROUNDS:
        for name, form in forms.items():
            begin = time.perf_counter()
            form()
            taken[name].append(time.perf_counter() - begin)
    print(f"{title}, batch {BATCH}, {torch.get_num_threads()} threads")
    print(f"  {'':<32} {'median, ms':>12} {'ratio':>6} {'least, ms':>12} {'ratio':>6}  calls until settled")
    for name, (calls, settled) in before.items():
        figures = [(f(taken[name]), f(taken["published"])) for f in (statistics.median, min)]
        times = "".join(f" {1e3 * own:12.2f} {published / own:6.2f}" for own, published in figures)
        print(f"  {name:<32}{times}  {calls}" + ("" if settled else ", NOT SETTLED"))


def forward(model: EncDiff, seconds: float) -> None:
    x, t, tokens = torch.randn(BATCH, 3, 16, 16), torch.randint(1000, (BATCH,)), torch.randn(BATCH, 20, 16)
    last = torch.channels_last
    published, ours, half = published_twin(model).unet, model.unet, copy.deepcopy(model.unet).to(memory_format=last)

    def autocast(unet, x):
        with torch.autocast("cpu", torch.bfloat16):
            return unet(x, t, tokens)

    forms = {
        "published": lambda: published(x, t, tokens),
        "ours": lambda: ours(x, t, tokens),
        "ours, channels last": lambda: half(x.contiguous(memory_format=last), t, tokens),
        "published, bf16": lambda: autocast(published, x),
        "ours, bf16": lambda: autocast(ours, x),
    }
    with torch.inference_mode():
        in_turns("U-Net forward", forms, seconds)


def one_cross_attention(seconds: float) -> None:
    tensors = inputs(BATCH, 256, 64, 20, 16, torch.device("cpu"), torch.float32)
    forms = {name: lambda op=op: op(*tensors) for name, op in OPS.items()}
    with torch.inference_mode():
        in_turns("cross-attention, 256 queries, 64 channels, 20 tokens", forms, seconds)


def training_step(model: EncDiff, seconds: float) -> None:
    images, indices = torch.randint(256, (BATCH, 64, 64, 3), dtype=torch.uint8), torch.arange(BATCH)
    published = PublishedTraining(published_twin(model.train()), 1e-4)

    def ours(latents, **options) -> Callable:
        training = Training(copy.deepcopy(model), TrainConfig(batch_size=BATCH, **options))
        training.latents = latents
        return lambda: training.advance(images, indices)

    latents = torch.randn(BATCH, 3, 16, 16)
    forms = {
        "published": lambda: published.advance(to_float(images)),
        "ours, latents encoded once": ours(latents),
        "ours, encoding in the step": ours(None),
        "ours, bf16, latents encoded once": ours(latents, precision="bf16"),
    }
    in_turns("training step", forms, seconds)


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 40.0
    one_cross_attention(min(5.0, seconds))
    model = fresh_model(PAPER, torch.device("cpu")).eval()
    forward(model, seconds)
    training_step(model, seconds)
