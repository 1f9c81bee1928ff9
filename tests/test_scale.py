"""Predictions of data-parallel training against closed forms, limits, and simulations that move real numbers."""

import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import TINY
from torch import nn

from bench import scale
from bench.scale import COUNTS, LINKS, PROTOCOLS, Cluster, Exchanges, Link, Protocol, Step
from encdiff import EncDiff
from encdiff.errors import InputError
from encdiff.training import TrainConfig
from encdiff.training.step import Training

NOTHING = (0.0,)
PLAIN = (Protocol(0.0, 1.0),)
REAL = Cluster(LINKS["infiniband"])


@pytest.fixture(scope="module")
def paper() -> Exchanges:
    return scale.count()


def cluster(
    bandwidth: float = math.inf, hop: float = 0.0, tree: float = 0.0, per_machine: int = 8, **inside
) -> Cluster:
    within = Link(inside.get("inside", math.inf), (inside.get("inside_hop", 0.0),), NOTHING)
    return Cluster(Link(bandwidth, (hop,), (tree,)), within, per_machine, PLAIN)


def ring_reduce_scatter(parts: list[list[np.ndarray]], sent: list[int]) -> None:
    """Of p processes with p chunks each: afterwards chunk (r + 1) % p of process r is the sum of all."""
    p = len(parts)
    for step in range(p - 1):
        moving = [(r, (r - step) % p, parts[r][(r - step) % p].copy()) for r in range(p)]
        for r, chunk, values in moving:
            parts[(r + 1) % p][chunk] = parts[(r + 1) % p][chunk] + values
            sent[r] += len(values)


def ring_all_gather(parts: list[list[np.ndarray]], sent: list[int]) -> None:
    """Spread what `ring_reduce_scatter` left."""
    p = len(parts)
    for step in range(p - 1):
        moving = [(r, (r + 1 - step) % p, parts[r][(r + 1 - step) % p].copy()) for r in range(p)]
        for r, chunk, values in moving:
            parts[(r + 1) % p][chunk] = values
            sent[r] += len(values)


@pytest.mark.parametrize(("machines", "each"), [(1, 3), (1, 8), (2, 4), (3, 2), (5, 1), (4, 3)])
def test_bytes_are_those_of_an_all_reduce_that_moves_numbers(machines, each):
    n, length = machines * each, 2 * each * machines * 3
    rng = np.random.default_rng(random.getrandbits(32))
    values = rng.integers(0, 1000, (n, length))
    inside, outside = [0] * n, [0] * n
    held = [list(np.split(row, each)) for row in values]
    for m in range(machines):
        own, sent = held[m * each : (m + 1) * each], [0] * each
        ring_reduce_scatter(own, sent)
        inside[m * each : (m + 1) * each] = sent
    for g in range(each):  # the chunk that the g-th GPU of every machine holds the machine's sum of
        chunk, sent = (g + 1) % each, [0] * machines
        parts = [list(np.split(held[m * each + g][chunk], machines)) for m in range(machines)]
        ring_reduce_scatter(parts, sent)
        ring_all_gather(parts, sent)
        for m in range(machines):
            held[m * each + g][chunk] = np.concatenate(parts[m])
            outside[m * each + g] += sent[m]
    for m in range(machines):
        sent = [0] * each
        ring_all_gather(held[m * each : (m + 1) * each], sent)
        for g in range(each):
            inside[m * each + g] += sent[g]
    assert all((np.concatenate(row) == values.sum(0)).all() for row in held)
    within, around = Cluster(LINKS["ethernet"], per_machine=each).sent(length, n)
    assert inside == [within] * n and outside == [around] * n


def test_one_gpu_takes_exactly_its_step(paper):
    step = Step(0.0123, 96)
    for whole in (None, 96):
        row = scale.rows(paper, step, REAL, whole)[0]
        assert (row.n, row.exposed, row.overlapped, row.norms) == (1, 0, 0, 0)
        assert row.efficiency == 1 and row.images == pytest.approx(96 / 0.0123)


def test_without_latency_and_with_infinite_bandwidth_nothing_is_lost(paper):
    assert all(row.exposed == 0 and row.efficiency == 1 for row in scale.rows(paper, Step(0.01), cluster()))


def test_an_all_reduce_is_latency_and_bandwidth_in_closed_form():
    """Within a machine 2 (g - 1) hops and 2 (g - 1) / g of the bytes; between m machines a ring's or a tree's."""
    size, n, m, g = 4800, 24, 3, 8
    ways = dict(bandwidth=50.0, inside=70.0, inside_hop=0.3)
    within = 14 * 0.3 + 2 * 7 / 8 * size / 70
    ring = cluster(**ways, hop=0.2, tree=1e9).all_reduce(size, n)
    assert ring == pytest.approx(within + 2 * (m - 1) * 0.2 + 2 * (m - 1) / m * size / g / 50)
    tree = cluster(**ways, hop=1e9, tree=0.2).all_reduce(size, n)
    assert tree == pytest.approx(within + 2 * 2 * 0.2 + 2 * size / g / 50)
    assert cluster(**ways, hop=0.2).all_reduce(size, 8) == pytest.approx(within)


def alone(link: Link, i: int) -> Link:
    return Link(link.bandwidth, link.ring[i : i + 1], link.tree[i : i + 1])


def test_the_quickest_protocol_is_taken():
    for size in (8, 10**4, 10**6, 10**8):
        single = [
            Cluster(alone(LINKS["infiniband"], i), alone(LINKS["nvlink"], i), 8, (p,)) for i, p in enumerate(PROTOCOLS)
        ]
        assert REAL.all_reduce(size, 64) == min(c.all_reduce(size, 64) for c in single)


def test_time_grows_with_gpus_and_falls_with_bandwidth(paper):
    by_link = [
        [r.exposed for r in scale.rows(paper, Step(0.01), Cluster(LINKS[k]))] for k in ("ethernet", "infiniband")
    ]
    assert all(a == sorted(a) and len(a) == len(COUNTS) for a in by_link)
    assert all(a >= b for a, b in zip(*by_link, strict=True)) and by_link[0][4] > 2 * by_link[1][4]


def test_gpus_that_fill_no_machines_are_refused():
    assert [REAL.machines(n) for n in (1, 5, 8, 24)] == [(1, 1), (1, 5), (1, 8), (3, 8)]
    for n in (0, 12, -8):
        with pytest.raises(InputError, match=f"{n} GPUs"):
            REAL.machines(n)


def padded(parameters: list[nn.Parameter]) -> int:
    return sum(-(-p.numel() // 64) * 64 for p in parameters)


@pytest.mark.parametrize("config", [TINY, None], ids=["tiny", "paper"])
def test_exchanges_are_those_of_the_modules(config, paper):
    """Two for each batch norm, forward its two moments in float64 and backward its two sums in float32; then the two
    numbers told, gradients in bfloat16, and those of batch norm in float32."""
    found = paper if config is None else scale.count(config)
    with torch.device("meta"):
        model = EncDiff(*[config] if config else [scale.EncDiffConfig()])
    norms = [m for m in model.cond_stage_model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    forward, backward = ([2 * size * m.num_features for m in norms] for size in (8, 4))
    assert len(norms) > 2 and found.norms == forward + backward[::-1]
    assert found.told == [2 * 4]
    exact = [p for m in norms for p in m.parameters()]
    learn = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in exact)]
    assert found.gradients == [2 * padded(learn), 4 * padded(exact)]
    assert found.bytes() == sum(forward + backward) + 8 + 2 * padded(learn) + 4 * padded(exact)


def test_a_checkpoint_is_as_large_as_one_of_a_cpu():
    training = Training(EncDiff(TINY), TrainConfig(batch_size=2, precision="bf16", engine="eager"), masters=True)
    training.advance(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.arange(2))
    assert scale.count(TINY).checkpoint == sum(t.numel() * t.element_size() for t in training.tensors().values())


def test_other_numbers_of_parameters_send_two_bytes_each(paper):
    larger = paper.of(1.1e9)
    assert larger.gradients == [2_200_000_000] and larger.norms == paper.norms
    assert larger.checkpoint / paper.checkpoint == pytest.approx(2.2e9 / sum(paper.gradients))


def test_overlap_hides_all_but_the_last_bucket_of_a_long_backward_pass():
    size = 4 * scale.BUCKET - 11
    given = Exchanges([], [], [size], 0)
    one = REAL.all_reduce(-(-size // 4), 64)
    assert scale.exposed(given, 64, REAL, backward=1.0) == pytest.approx(one)
    assert scale.exposed(given, 64, REAL, backward=0.0) == pytest.approx(4 * one)
    short = 2 * one  # a bucket is there every half of the time that one takes: they queue
    assert scale.exposed(given, 64, REAL, short) == pytest.approx(short / 4 + 4 * one - short)


def test_overlap_cannot_hide_batch_norm(paper):
    norms = sum(REAL.all_reduce(size, 64) for size in (*paper.norms, *paper.told))
    hidden, whole = scale.exposed(paper, 64, REAL, 1.0), scale.exposed(paper, 64, REAL)
    assert norms < hidden < whole


def test_a_step_of_another_batch():
    step = Step(0.02, 128, fixed=0.25)
    assert step.seconds(128) == pytest.approx(0.02) and step.seconds(0) == pytest.approx(0.005)
    assert step.seconds(256) - step.seconds(128) == pytest.approx(0.015)
    assert step.backward(128) == pytest.approx(2 / 3 * (0.02 - scale.OPTIMIZER))


def test_a_fixed_batch_is_shared_out(paper):
    found = scale.rows(paper, Step(0.01), REAL, 64)
    assert [(r.n, r.batch) for r in found] == [(n, 64 / n) for n in COUNTS if n <= 64]


def simulated(interval: float, save: float, restart: float, mean: float, seconds: float, rng: random.Random) -> float:
    """The part of a long run's time that was lost, with failures at random moments, none of them while it restarts."""
    now = kept = 0.0
    failure = rng.expovariate(1 / mean)
    while now < seconds:
        if now + interval + save <= failure:
            now, kept = now + interval + save, kept + interval
        else:
            now = failure + restart
            failure = now + rng.expovariate(1 / mean)
    return 1 - kept / now


@pytest.mark.parametrize("interval", [200, 775, 3000])
def test_what_failures_cost_is_what_a_simulation_loses(interval):
    save, restart, mean = 3.0, 120.0, 100_000.0
    found = simulated(interval, save, restart, mean, 4e8, random.Random(interval))
    assert scale.lost(interval, save, restart, mean) == pytest.approx(found, rel=0.06)


def test_no_interval_loses_less_than_youngs():
    save, restart, mean = 3.0, 120.0, 100_000.0
    best = scale.young(save, mean)
    assert best == pytest.approx(math.sqrt(600_000))
    grid = [best * 1.05**i for i in range(-40, 41)]
    least = min(grid, key=lambda interval: scale.lost(interval, save, restart, mean))
    assert least == pytest.approx(best, rel=0.06)


def printed(monkeypatch, capsys, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["scale", *options])
    scale.main()
    return capsys.readouterr().out


def test_the_command_prints_what_the_page_shows(paper, monkeypatch, capsys):
    """docs/scale.md has the tables as printed, and its sentences figures of them."""
    monkeypatch.setattr(scale, "count", lambda: paper)
    said = printed(monkeypatch, capsys)
    assert said.startswith("Predicted from one GPU's step; not measured on several GPUs.")
    lines = [line for line in said.splitlines() if line.startswith("|")]
    assert len(lines) == 2 * (2 + len(COUNTS)) + 2 + 4
    page = (Path(__file__).parent.parent / "docs/scale.md").read_text()
    assert "\n".join(lines[: 2 + len(COUNTS)]) in page and "\n".join(lines[-6:]) in page
    shared = {row[0]: row for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines[14:-6])}
    rate, most = shared["128"][6], shared["512"][6]
    assert f"a step of 32 images would take {shared['128'][2]} ms" in page
    assert f"{rate} images/s there, {most} on 512" in page
    assert f"{paper.bytes() / 1e6:.2f} MB, of which {sum(paper.gradients) / 1e6:.2f} are gradients" in page
    assert f"exchanges, {sum(paper.norms) / 1e6:.2f} MB together, take {lines[11].split('|')[4].strip()} ms" in page


def test_the_page_has_the_figures_of_a_slow_link(paper, monkeypatch, capsys):
    monkeypatch.setattr(scale, "count", lambda: paper)
    lines = printed(monkeypatch, capsys, "--link", "ethernet").splitlines()
    rows = {cells[1].strip(): cells for cells in (line.split("|") for line in reversed(lines)) if len(cells) == 10}
    few, many = ([rows[n][i].strip().rstrip("%") for i in (6, 8)] for n in ("16", "512"))
    page = (Path(__file__).parent.parent / "docs/scale.md").read_text().replace("\n  ", " ")
    assert f"efficiency of {few[0]} %, and {few[1]} with buckets; 512 have {many[0]} and {many[1]}." in page
