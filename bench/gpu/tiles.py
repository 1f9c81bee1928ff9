"""Block `tiles`: every tile of the tables that dispatch reads, timed at the paper's layers.

`OUT/tables.txt` has the best of each key, ready to paste (`bench.gpu.tables`).

Many processes compile first (`compile_share`), with what they find in Triton's cache on disk; then one times.
"""

from collections.abc import Callable, Iterator
from itertools import product
from typing import NamedTuple

import torch
from encdiff.kernels import self_attention as attention
from encdiff.kernels.cross_attention import cross_attention_folded, cross_attention_heads, plan

from bench.clock import Run, repeated, replayed
from bench.gpu import checks, tables
from bench.gpu.checks import layers
from bench.gpu.lab import Lab
from bench.gpu.steps import advance, ours


class Sweep(NamedTuple):
    """`table[key] = put(candidate)` for each candidate, then `run()`."""

    name: str
    table: dict
    key: tuple
    candidates: list
    run: Run
    layers: int  # how many of a U-Net's layers have this shape
    positions: int


def sweeps(lab: Lab) -> Iterator[Sweep]:
    """Of the 16 attending layers of the paper's U-Net, bf16."""
    c, B, N = lab.config, lab.batch, lab.config.concepts
    counts = {256: 5, 64: 5, 16: 5, 4: 1}  # of the paper's
    for L, C in layers(c):
        width, H = C // c.heads, c.heads
        n = counts.get(L, 1)
        x, dy = (torch.randn(B, L, C, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
        keys, values = (torch.randn(B, H, N, C, device=lab.device, dtype=torch.bfloat16) / 8 for _ in range(2))
        b_o, gamma, beta = (torch.randn(C, device=lab.device) for _ in range(3))
        rows = [r for r in (16, 32, 64, 128) if r <= max(16, L)]

        def folded(x=x, keys=keys, values=values, b_o=b_o, gamma=gamma, beta=beta):
            return cross_attention_folded(x, keys, values, b_o, gamma, beta, None, 1e-5, True, "none")

        def folded_backward(x=x, keys=keys, values=values, gamma=gamma, beta=beta, dy=dy):
            return torch.ops.encdiff.cross_attention_folded_bwd(
                x, keys, values, gamma, beta, None, dy, 1e-5, True, False
            )

        if plan.can_fold(C, N, 2):
            for kernel, run in (("fwd", folded), ("dx", folded_backward), ("dkv", folded_backward)):
                tiles = [plan.FoldedTile(*t) for t in _folded(kernel, rows)]
                key = (kernel, True, plan.pad(C, 64))
                yield Sweep(f"FOLDED {kernel} C={C} L={L}", plan.FOLDED_TILES, key, tiles, run, n, L)
        q, do = (torch.randn(B, L, C, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
        k, v = (torch.randn(B, N, C, device=lab.device, dtype=torch.bfloat16) for _ in range(2))
        lse = cross_attention_heads(q, k, v, None, H, width**-0.5, False)[1]

        def heads(q=q, k=k, v=v, H=H, width=width):
            return cross_attention_heads(q, k, v, None, H, width**-0.5, False)

        def heads_backward(q=q, k=k, v=v, lse=lse, do=do, H=H, width=width):
            return torch.ops.encdiff.cross_attention_heads_bwd(q, k, v, None, lse, do, H, width**-0.5, False)

        for kernel, run in (("fwd", heads), ("dq", heads_backward), ("dkv", heads_backward)):
            if L <= 16 and width <= 32 and N <= 32:
                continue  # these take a short tile of their own, whatever the table says
            tiles = [plan.HeadsTile(r, 128 if kernel != "dkv" else 32, w) for r, w in product(rows, (1, 2, 4))]
            yield Sweep(
                f"HEADS {kernel} C={C} L={L}", plan.HEADS_TILES, (kernel, True, plan.pad(width, 32)), tiles, run, n, L
            )
        qkv = torch.randn(B, L, 3 * C, device=lab.device, dtype=torch.bfloat16)
        o, lse_self = attention.self_attention(qkv, H, width**-0.5)

        def attend(qkv=qkv, H=H, width=width):
            return attention.self_attention(qkv, H, width**-0.5)

        def attend_backward(qkv=qkv, o=o, lse=lse_self, do=do, H=H, width=width):
            return torch.ops.encdiff.self_attention_backward(qkv, o, lse, do, H, width**-0.5)

        for kernel, run in (("fwd", attend), ("bwd", attend_backward)):
            tiles = [(attention.Tile(*t),) for t in _self_attention(kernel, L)]
            key = (kernel, True, attention.pad_width(width))
            yield Sweep(f"SELF {kernel} d={width} L={L}", attention.TILES, key, tiles, run, n, L)


def _folded(kernel: str, rows: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """Queries, heads, warps, stages."""
    for r, heads, w, stages in product(rows, (1, 2, 4), (2, 4, 8), (2, 1)):
        # of two heads dkv has wgmma of what it computed and transposed: not to be chosen unless results are checked
        held = stages == 2 or (heads == 1 and w == 4)
        if held and 4 <= r * heads / w <= 32 and not (heads == 4 and (kernel == "dkv" or r < 32)):
            yield r, heads, w, stages


def _self_attention(kernel: str, L: int) -> Iterator[tuple[int, int, int, int]]:
    """Rows, columns, warps, stages; of the backward, keys short of all leave a share of dq to be summed."""
    rows = [r for r in (16, 32, 64, 128, 256) if L // 4 <= r <= max(16, L)]
    least = 4 if L <= 16 else 8 if kernel == "fwd" else 16  # elements of a thread
    for r, c, w, stages in product(rows, (16, 32, 64), (1, 2, 4, 8), (1, 2)):
        # of 64 queries the backward has wgmma of what it computed and transposed: not to be chosen unless checked
        known = stages == 2 if kernel == "fwd" else c < 64
        if known and c <= max(16, L) and least <= r * c / w / 32 <= 64:
            yield r, c, w, stages


def candidates(lab: Lab, sweep: Sweep) -> list:
    """All of them; without a GPU, where kernels are interpreted, the first."""
    return sweep.candidates[:1] if lab.cpu else sweep.candidates


def in_order(lab: Lab) -> list[Sweep]:
    """What is least known first."""
    return sorted(sweeps(lab), key=lambda sweep: ("SELF", "FOLDED", "HEADS").index(sweep.name.split()[0]))


def compile_share(lab: Lab, share: int, shares: int) -> dict:
    """Run every candidate of this share once, so that Triton's cache holds it."""
    tried = failed = 0
    for n, (sweep, tile) in enumerate((s, t) for s in in_order(lab) for t in candidates(lab, s)):
        if n % shares == share:
            tried += 1
            failed += attempt(sweep, tile, sweep.run) is None
    return {"tried": tried, "failed": failed}


def attempt(sweep: Sweep, tile, run: Callable):
    """What `run` gives with this tile in the table, None where it does not compile or asks for too much."""
    before = sweep.table[sweep.key]
    sweep.table[sweep.key] = tile
    try:
        return run()
    except Exception as error:
        if type(error).__name__ == "Late":
            raise
        return None
    finally:
        sweep.table[sweep.key] = before


def measure(lab: Lab) -> dict:
    found: dict[str, dict] = {}
    for sweep in in_order(lab):
        now = attempt(sweep, sweep.table[sweep.key], lambda s=sweep: replayed(s.run, lab.device, repeats=5))
        times: dict[str, float] = {}
        try:
            for tile in candidates(lab, sweep):
                seconds = attempt(sweep, tile, lambda s=sweep: replayed(s.run, lab.device, calls=10, repeats=3))
                if seconds is not None:
                    times[str(tuple(tile[0] if isinstance(tile[0], tuple) else tile))] = 1e6 * seconds
        finally:  # what there is, also when time is up
            found[sweep.name] = {
                "now_us": None if now is None else 1e6 * now,
                "key": str(sweep.key),
                "us": dict(sorted(times.items(), key=lambda item: item[1])),
                "layers": sweep.layers,
                "positions": sweep.positions,
            }
            lab.save("tiles", found)
            (lab.out / tables.FILE).write_text(tables.text(found))
    return found


def measure_tuned(lab: Lab) -> dict:
    """The step as it is and with the best of the sweep in the tables, and whether attention is right with them."""
    found: dict = {"seconds": {}}

    def step() -> float:
        return repeated(advance(ours(lab, masters=True, precision="bf16"), lab), lab.device)

    found["seconds"]["step with the tables as they are"] = step()
    with tables.taken(lab.load("tiles") or {}) as found["changed"]:
        of_attention = [c for c in checks.cases(lab, lab.batch) if "attention" in c.name]
        found["right"] = [checks.check(case, seed=n) for n, case in enumerate(of_attention)]
        lab.save("tuned", found)
        found["seconds"]["step with the best of the sweep"] = step()
    return found


def tuned_lines(found: dict) -> list[str]:
    said = [f"{name:42} {1e3 * seconds:8.2f} ms" for name, seconds in found["seconds"].items()]
    return [*said, *found.get("changed", []), *checks.lines(found.get("right", []))]


def lines(found: dict) -> list[str]:
    said = [f"the best of each key, ready to paste: {tables.FILE}"]
    for name, r in found.items():
        best = next(iter(r["us"].items()), ("none", float("nan")))
        said.append(f"{name:26} {r['key']:22} now {r['now_us'] or float('nan'):7.2f} best {best[1]:7.2f} us {best[0]}")
    return said
