"""What the sweep of tiles found, as lines to paste into the tables of kernels/.

Layers of several shapes may share a key: the tile then is the one of least time over all of them, each shape counted as
often as a U-Net has it, and only what was timed at every shape is chosen from.
"""

from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import NamedTuple

from encdiff.kernels import self_attention as attention
from encdiff.kernels.cross_attention import plan

FILE = "tables.txt"
PLAN, SELF = "kernels/cross_attention/plan.py", "kernels/self_attention.py"
TABLES = {  # kind of a sweep: table, its name and file, type of its tiles
    "FOLDED": (plan.FOLDED_TILES, "FOLDED_TILES", PLAN, plan.FoldedTile),
    "HEADS": (plan.HEADS_TILES, "HEADS_TILES", PLAN, plan.HeadsTile),
    "SELF": (attention.TILES, "TILES", SELF, attention.Tile),
}
HEAD = """\
# Of block `tiles`, 16 bits. Before an entry is kept it must pass `make gate`, and the checks of the kernels on the GPU:
# `python -m bench.gpu OUT --only beside`. Microseconds are of all layers of the key: with this entry, and with today's.
"""


class Shape(NamedTuple):
    """Of the sweep of one key at one number of positions: microseconds of each tile, and now."""

    positions: int
    layers: int
    times: dict[tuple, float]
    now: float | None


def timed(found: dict) -> dict[tuple[str, tuple], list[Shape]]:
    """(kind, key) -> its shapes, of a result of `tiles.measure`."""
    keys: dict[tuple, list[Shape]] = {}
    for name, r in found.items():
        times = {literal_eval(tile): us for tile, us in r["us"].items()}
        shape = Shape(r["positions"], r["layers"], times, r["now_us"])
        keys.setdefault((name.split()[0], literal_eval(r["key"])), []).append(shape)
    return {key: sorted(shapes, key=lambda s: s.positions) for key, shapes in keys.items()}


def choose(kind: str, key: tuple, shapes: list[Shape]) -> tuple[float, tuple] | None:
    """(microseconds of all layers, entry) of the best, None if no tile was timed at every shape."""
    table, _, _, tile = TABLES[kind]
    return (tiles_of if kind == "SELF" else tile_of)(shapes, table[key], tile)


def text(found: dict) -> str:
    """The tables of a result of `tiles.measure`, ready to paste."""
    keys, said = timed(found), [HEAD]
    for kind, (_, title, file, _) in TABLES.items():
        of_kind = {key: shapes for (k, key), shapes in keys.items() if k == kind}
        if of_kind:
            said += [f"# {file}", f"{title}:"]
            said += [line(kind, key, shapes, choose(kind, key, shapes)) for key, shapes in of_kind.items()]
    return "\n".join(said) + "\n"


@contextmanager
def taken(found: dict, gain: float = 0.03) -> Iterator[list[str]]:
    """Inside, the tables have the best of a sweep where that is faster by so much; what was changed, in words.

    Without those of which compilers are known to make wrong gradients: they are to be looked at first.
    """
    before, said = [], []
    for (kind, key), shapes in timed(found).items():
        best, now = choose(kind, key, shapes), total([shape.now for shape in shapes], shapes)
        if best is None or now is None or best[0] > (1 - gain) * now or is_doubtful(kind, key, best[1]):
            continue
        table = TABLES[kind][0]
        before.append((table, key, table[key]))
        table[key] = best[1]
        said.append(f"{kind} {key}: {written(best[1])}, {now:.1f} to {best[0]:.1f} us")
    try:
        yield said
    finally:
        for table, key, entry in before:
            table[key] = entry


def is_doubtful(kind: str, key: tuple, entry: tuple) -> bool:
    """Whether the kernel then has wgmma of an operand that it computed and transposed."""
    return kind == "FOLDED" and key[0] == "dkv" and entry.GROUP > 1


def line(kind: str, key: tuple, shapes: list[Shape], best: tuple[float, object] | None) -> str:
    layers = sum(shape.layers for shape in shapes)
    if best is None:
        return f"    # {key}: no tile was timed at every shape"
    us, entry = best
    now = total([shape.now for shape in shapes], shapes)
    if now is not None and now <= us:
        return f"    # {key}: as it is, {now:.1f} us of {layers} layers; the best of the others {us:.1f}"
    comment = f"{us:.1f} us of {layers} layers, now " + ("unknown" if now is None else f"{now:.1f}")
    if is_doubtful(kind, key, entry):
        comment += "; CHECK its gradients first: wgmma of a computed, transposed operand"
    return f"    {str(key).replace(chr(39), chr(34))}: {written(entry)},  # {comment}"


def written(entry: tuple) -> str:
    """A tile, or several, as the source has them: without a last value that is the default."""
    if entry and isinstance(entry[0], tuple):
        return "(" + ", ".join(map(written, entry)) + ("," if len(entry) == 1 else "") + ")"
    defaults = entry._field_defaults
    values = [str(v) for name, v in entry._asdict().items() if defaults.get(name) != v]
    return f"{type(entry).__name__}({', '.join(values)})"


def total(times: list[float | None], shapes: list[Shape]) -> float | None:
    """Microseconds of all layers, None if a shape's are unknown."""
    if None in times:
        return None
    return sum(us * shape.layers for us, shape in zip(times, shapes, strict=True))


def tile_of(shapes: list[Shape], old: tuple, tile: type) -> tuple[float, tuple] | None:
    """(microseconds, tile) of a table with one tile for all shapes of a key."""
    everywhere = set.intersection(*(set(shape.times) for shape in shapes))
    sums = [(total([shape.times[t] for shape in shapes], shapes), tile(*t)) for t in everywhere]
    return min(sums, default=None)


def tiles_of(shapes: list[Shape], old: tuple, tile: type) -> tuple[float, tuple] | None:
    """(microseconds, tiles) of self-attention's table: of a key several, the first that has all positions at once."""
    found = []
    for tiles in product(*(shape.times for shape in shapes)):
        taken = [next((t for t in tiles if t[0] >= shape.positions), tiles[-1]) for shape in shapes]
        us = total([shape.times.get(t) for t, shape in zip(taken, shapes, strict=True)], shapes)
        if us is not None:
            found.append((us, tuple(tile(*t) for t in dict.fromkeys(taken))))
    if not found:
        return None
    us, best = min(found)
    least, most = shapes[0].positions, shapes[-1].positions
    before = tuple(t for t in old if t.BLOCK_L < least)
    # what serves more positions stays, unless the last tile, which serves all that no other does, has fewer rows
    after = tuple(t for t in old if t.BLOCK_L > most or t is old[-1]) if best[-1].BLOCK_L >= most else ()
    return us, tuple(dict.fromkeys((*before, *best, *after)))
