"""What data-parallel training would take on 1 to 512 GPUs: predicted from one GPU's step, not measured on several.

    python -m bench.scale [--step-ms 9.76] [--batch 128] [--global-batch 4096] [--link infiniband|ethernet|nvlink]

What processes tell each other in a step is counted: a training step of the real code runs on the meta device, with
all-reduces, the only exchange in it, written down. What one takes is a formula: launch + hops x latency + bytes /
bandwidth. One of V bytes over m machines of g GPUs adds up V / g a GPU within each machine (a ring over NVLink), takes
these parts to all machines (a ring or a tree, the quicker one), and spreads them in the machine again.

Links are as their makers state them, each way, for one GPU: fourth-generation NVLink 900 GB/s both ways together (data
sheets of H100 and H200), a machine's eight adapters of 400 Gbit/s InfiniBand (DGX H100 user guide), or one of 100
Gbit/s Ethernet with RDMA for all eight. Launches, latencies and protocols are those by which NCCL itself chooses
(src/graph/tuning.cc at b6475625). No traffic of others, no waiting for the slowest, no failing link is in it.

A checkpoint that takes 2 s is one of 0.8 GB, with its model, at 0.4 GB/s; 120 s are a minute until a process counts as
lost (ENCDIFF_TIMEOUT) and one to begin anew: both are assumed. One failure of a machine in 264 days is Llama 3's rate:
419 in 54 days of 2,048 machines of 8 H100 (arXiv 2407.21783, section 3.3.4).
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from encdiff.distributed import processes
from encdiff.distributed.processes import Processes
from encdiff.errors import InputError
from encdiff.models import EncDiff, EncDiffConfig
from encdiff.training import TrainConfig
from encdiff.training.step import Training

COUNTS = tuple(2**i for i in range(10))
OPTIMIZER = 0.37e-3  # seconds of AdamW and averages, of the step on an H200 (docs/performance.md)
FIXED = 0.54  # of a step, what a smaller batch saves nothing of; assumed: see `Step`
BUCKET = 25 * 2**20  # bytes, as DistributedDataParallel cuts gradients


class Protocol(NamedTuple):
    """How NCCL sends: seconds to launch, the part of a link's bandwidth that is data."""

    launch: float
    share: float


PROTOCOLS = (Protocol(6.6e-6, 1 / 4), Protocol(14e-6, 0.92), Protocol(8.4e-6, 1.0))  # LL, LL128, Simple


@dataclass(frozen=True)
class Link:
    """Of one GPU: bytes per second each way; seconds of a hop, in a ring and in a tree, for each protocol."""

    bandwidth: float
    ring: tuple[float, ...]
    tree: tuple[float, ...]


NETWORK = {"ring": (2.7e-6, 4e-6, 14e-6), "tree": (5e-6, 8.5e-6, 28e-6)}
LINKS = {
    "nvlink": Link(450e9, (0.6e-6, 1.9e-6, 3.4e-6), (0.6e-6, 1.25e-6, 28e-6)),
    "infiniband": Link(400e9 / 8, **NETWORK),  # bits
    "ethernet": Link(100e9 / 8 / 8, **NETWORK),  # bits, of which eight GPUs have an eighth each
}


@dataclass(frozen=True)
class Cluster:
    """Machines of `per_machine` GPUs each."""

    between: Link
    inside: Link = LINKS["nvlink"]
    per_machine: int = 8
    protocols: tuple[Protocol, ...] = PROTOCOLS

    def machines(self, n: int) -> tuple[int, int]:
        """How many machines n GPUs are, and how many GPUs of each."""
        if n < 1 or (n > self.per_machine and n % self.per_machine):
            raise InputError(f"{n} GPUs: must be at most {self.per_machine}, or a multiple of it")
        return max(1, n // self.per_machine), min(n, self.per_machine)

    def sent(self, size: int, n: int) -> tuple[float, float]:
        """Bytes that each GPU sends in an all-reduce of so many: to its own machine, and to others in a ring."""
        m, g = self.machines(n)
        return 2 * (g - 1) / g * size, 2 * (m - 1) / m * size / g

    def all_reduce(self, size: int, n: int) -> float:
        """Seconds until the sum of so many bytes is on all n GPUs, by the quickest protocol and form."""
        m, g = self.machines(n)
        if n == 1:
            return 0.0
        within, around = self.sent(size, n)
        ways = []
        for i, p in enumerate(self.protocols):
            base = p.launch + 2 * (g - 1) * self.inside.ring[i] + within / (p.share * self.inside.bandwidth)
            rate = p.share * self.between.bandwidth
            ring = 2 * (m - 1) * self.between.ring[i] + around / rate
            tree = 2 * math.ceil(math.log2(m)) * self.between.tree[i] + (2 * size / g / rate if m > 1 else 0)
            ways.append(base + min(ring, tree))
        return min(ways)


class Exchanges(NamedTuple):
    """Of one step the bytes of each all-reduce: those of batch norm, forward and backward, the two numbers told, the
    gradients. Of a run the bytes of a checkpoint."""

    norms: list[int]
    told: list[int]
    gradients: list[int]
    checkpoint: int

    def bytes(self) -> int:
        return sum((*self.norms, *self.told, *self.gradients))

    def of(self, parameters: float) -> "Exchanges":
        """Those of a model with so many parameters that learn, all in bfloat16."""
        scale = parameters * 2 / sum(self.gradients)
        return self._replace(gradients=[round(2 * parameters)], checkpoint=round(scale * self.checkpoint))


def count(config: EncDiffConfig | None = None) -> Exchanges:
    """What each process sends in one training step in bfloat16, by running it on the meta device.

    config: None for the paper's.
    """
    called: list[int] = []
    after: list[int] = []

    class Counted(Training):
        def _exchange(self, loss: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
            after.append(len(called))
            return super()._exchange(loss, asked)

    with _imagined(called):
        with torch.device("meta"):
            model = EncDiff(config or EncDiffConfig())
        model.alphas_cumprod = model.alphas_cumprod.to("meta")
        training = Counted(model, TrainConfig(batch_size=4, precision="bf16", engine="eager"), masters=True)
        size = model.config.image_size
        images = torch.empty(2, size, size, 3, dtype=torch.uint8, device="meta")
        training.latents = torch.empty(2, *model.latent_shape, device="meta")
        training.advance(images, torch.empty(2, dtype=torch.int64, device="meta"))
        checkpoint = sum(t.numel() * t.element_size() for t in training.tensors().values())
    return Exchanges(called[: after[0]], called[after[0] : after[0] + 1], called[after[0] + 1 :], checkpoint)


@contextmanager
def _imagined(called: list[int]) -> Iterator[None]:
    """Inside, this process is the first of two, and the bytes of what it would add to theirs are written down."""

    def all_reduce(tensor: Tensor) -> None:
        called.append(tensor.numel() * tensor.element_size())

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_reduce", all_reduce))
        for told in ("from_first", "same"):  # before the first step
            stack.enter_context(mock.patch.object(Processes, told, lambda *_, **__: None))
        stack.enter_context(mock.patch.object(processes, "_joined", [Processes(0, 2, 0, 2)]))
        stack.enter_context(mock.patch.object(Training, "_autocast", lambda _: nullcontext()))  # meta has none
        yield


@dataclass(frozen=True)
class Step:
    """The step of one GPU: measured at one batch; at others, it is assumed, `fixed` of it stays and the rest shrinks.

    No training step at another batch was timed. 0.54 is of a line through what a sampling evaluation takes on an H200
    at batch 1 and 128 (1.77 and 3.24 ms, block `switches` of run 4).
    """

    measured: float
    batch: int = 128
    fixed: float = FIXED

    def seconds(self, batch: float) -> float:
        return self.measured * (self.fixed + (1 - self.fixed) * batch / self.batch)

    def backward(self, batch: float) -> float:
        """Two thirds of what is not the optimiser's."""
        return max(0.0, self.seconds(batch) - OPTIMIZER) * 2 / 3


def exposed(exchanges: Exchanges, n: int, cluster: Cluster, backward: float | None = None) -> float:
    """Seconds that a step waits for exchanges: all of them, as the code has it; or with gradients in buckets, each on
    its way as soon as the backward pass, which takes so long, has made it."""
    always = sum(cluster.all_reduce(size, n) for size in (*exchanges.norms, *exchanges.told))
    if backward is None:
        return always + sum(cluster.all_reduce(size, n) for size in exchanges.gradients)
    size = sum(exchanges.gradients)
    buckets = math.ceil(size / BUCKET)
    end = 0.0
    for i in range(buckets):
        end = max(end, (i + 1) / buckets * backward) + cluster.all_reduce(-(-size // buckets), n)
    return always + (end - backward if n > 1 else 0.0)


class Row(NamedTuple):
    """Of n GPUs with so many images each: seconds of the step alone, and of the exchanges that it waits for."""

    n: int
    batch: float
    step: float
    norms: float
    exposed: float
    overlapped: float

    @property
    def efficiency(self) -> float:
        return self.step / (self.step + self.exposed)

    @property
    def images(self) -> float:
        """A second."""
        return self.n * self.batch / (self.step + self.exposed)


def rows(exchanges: Exchanges, step: Step, cluster: Cluster, whole: int | None = None) -> list[Row]:
    """Of all COUNTS: with the step's batch for each GPU, or `whole` for all of them together."""
    found = []
    for n in COUNTS:
        batch = step.batch if whole is None else whole / n
        if batch < 1:
            break
        norms = sum(cluster.all_reduce(size, n) for size in exchanges.norms)
        hidden = exposed(exchanges, n, cluster, step.backward(batch))
        found.append(Row(n, batch, step.seconds(batch), norms, exposed(exchanges, n, cluster), hidden))
    return found


def young(save: float, between_failures: float) -> float:
    """Seconds between checkpoints that lose the least (Young 1974), of seconds to save and between two failures."""
    return math.sqrt(2 * save * between_failures)


def lost(interval: float, save: float, restart: float, between_failures: float) -> float:
    """The part of the time that goes into saving, and into half an interval and a restart for each failure."""
    return save / (interval + save) + (interval / 2 + restart) / between_failures


def table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in cells)])


def scaling(found: Sequence[Row]) -> str:
    head = ["GPUs", "images of each", "step, ms", "batch norm, ms", "gradients, ms", "efficiency", "images/s"]
    head.append("with overlap")
    cells = [
        (f"{r.n}", f"{r.batch:g}", f"{1e3 * r.step:.2f}", f"{1e3 * r.norms:.2f}", f"{1e3 * (r.exposed - r.norms):.2f}",
         f"{r.efficiency:.1%}", f"{r.images:,.0f}", f"{r.step / (r.step + r.overlapped):.1%}")
        for r in found
    ]  # fmt: skip
    return table(head, cells)


def failures(step: float, save: float, restart: float, days: float) -> str:
    """By number of machines: what failures cost at Young's interval, and at the default of 1,000 steps."""
    cells = []
    for machines in (1, 2, 8, 64):
        mean = days * 86400 / machines
        best = young(save, mean)
        cells.append(
            (f"{machines}", f"{mean / 3600:,.0f}", f"{best:,.0f} s, {best / step:,.0f} steps",
             f"{lost(best, save, restart, mean):.2%}", f"{lost(1000 * step, save, restart, mean):.2%}",
             f"{best / 2 + restart:,.0f} s")
        )  # fmt: skip
    head = ("machines", "hours between failures", "best interval", "time lost", "at every 1,000 steps", "one failure")
    return table(head, cells)


def summary(exchanges: Exchanges, cluster: Cluster, link: str, n: int = COUNTS[-1]) -> str:
    """What a step sends, by one and by each of n GPUs, and the size of a checkpoint."""
    calls = len(exchanges.norms) + len(exchanges.told) + len(exchanges.gradients)
    gradients = sum(exchanges.gradients)
    inside, outside = cluster.sent(gradients, n)
    return "\n".join((
        f"A step: {calls} exchanges, {len(exchanges.norms)} of them for batch norm; {exchanges.bytes() / 1e6:.2f} MB, "
        f"{gradients / 1e6:.2f} of them gradients.",
        f"Of {n} GPUs each sends {inside / 1e6:.0f} MB of them within its machine, {outside / 1e6:.0f} MB over {link}.",
        f"A checkpoint: {exchanges.checkpoint / 1e6:.0f} MB.",
    ))  # fmt: skip


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", type=float, default=9.76, help="of one GPU; default: an H200's, 9.76")
    parser.add_argument("--batch", type=int, default=128, help="for each GPU, at which the step was measured")
    parser.add_argument("--global-batch", type=int, default=4096, help="of all GPUs, where that is fixed")
    parser.add_argument("--parameters", type=float, help="that learn; default: counted, of the paper's configuration")
    parser.add_argument("--link", choices=LINKS, default="infiniband", help="between machines of 8 GPUs")
    parser.add_argument("--save", type=float, default=2.0, help="seconds that a checkpoint stops the training")
    parser.add_argument("--restart", type=float, default=120.0, help="seconds from a failure to the next step")
    parser.add_argument("--days", type=float, default=264.0, help="between failures of one machine")
    return parser.parse_args()


def main() -> None:
    o = options()
    exchanges, cluster, step = count(), Cluster(LINKS[o.link]), Step(o.step_ms / 1e3, o.batch)
    exchanges = exchanges.of(o.parameters) if o.parameters else exchanges
    print("Predicted from one GPU's step; not measured on several GPUs.\n")
    print(summary(exchanges, cluster, o.link))
    print(f"\n{o.batch} images for each GPU, machines joined by {o.link}\n")
    print(scaling(rows(exchanges, step, cluster)))
    print(f"\n{o.global_batch:,} images for all together. Assumed: {FIXED:.0%} of a step at {o.batch} stays\n")
    print(scaling(rows(exchanges, step, cluster, o.global_batch)))
    print(f"\nFailures: {o.days:g} days between two of one machine, {o.restart:g} s to go on, {o.save:g} s to save\n")
    print(failures(step.seconds(o.batch), o.save, o.restart, o.days))


if __name__ == "__main__":
    main()
