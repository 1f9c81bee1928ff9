"""What bench.gpu makes of a sweep of tiles: lines that the tables of kernels/ can hold."""

import re
import time

import pytest
from encdiff.kernels import self_attention as attention
from encdiff.kernels.cross_attention import plan

from bench.gpu import tiles
from bench.gpu.lab import Lab, Late
from bench.gpu.tables import taken, text, written
from bench.gpu.tiles import lines

FOLDED, SELF = plan.FoldedTile, attention.Tile
NAMES = {t.__name__: t for t in (plan.FoldedTile, plan.HeadsTile, attention.Tile)}


def sweep(key: tuple, positions: int, layers: int, us: dict, now: float | None = 10.0) -> dict:
    ranked = {str(tuple(tile)): time for tile, time in us.items()}
    return {"now_us": now, "key": str(key), "us": ranked, "layers": layers, "positions": positions}


def pasted(said: str) -> dict:
    """The entries as Python reads them."""
    entries = "\n".join(line for line in said.splitlines() if re.match(r"    \(", line))
    return eval("{" + entries + "\n}", dict(NAMES))


def comment(said: str, start: str) -> str:
    return next(line for line in said.splitlines() if line.strip().startswith(start)).partition("#")[2]


def test_shapes_of_one_key_are_decided_by_their_total_time():
    key, often, seldom = ("fwd", True, 256), FOLDED(32, 2, 8), FOLDED(16, 1, 4)
    said = text(
        {
            "FOLDED fwd C=256 L=16": sweep(key, 16, 5, {often: 4.0, seldom: 5.0, FOLDED(64, 1, 4): 1.0}),
            "FOLDED fwd C=256 L=4": sweep(key, 4, 1, {seldom: 2.0, often: 6.0}),
        }
    )
    assert pasted(said) == {key: often}  # 5 * 4 + 6 < 5 * 5 + 2; (64, 1, 4) was timed at one shape alone
    assert '    ("fwd", True, 256): FoldedTile(32, 2, 8),  # 26.0 us of 6 layers, now 60.0' in said.splitlines()
    assert "FOLDED_TILES:" in said and "make gate" in said


def test_weights_decide():
    key, a, b = ("dx", True, 64), FOLDED(64, 1, 4), FOLDED(32, 1, 4)
    for layers, best in ((1, b), (9, a)):
        first, second = sweep(key, 256, layers, {a: 1.0, b: 2.0}), sweep(key, 64, 1, {a: 9.0, b: 2.0})
        assert pasted(text({"FOLDED dx L=256": first, "FOLDED dx L=64": second})) == {key: best}


def test_every_table_has_its_heading_and_its_type():
    said = text(
        {
            "SELF fwd d=8 L=256": sweep(("fwd", True, 16), 256, 5, {SELF(128, 64, 4): 1.0}),
            "FOLDED dx C=128 L=64": sweep(("dx", True, 128), 64, 5, {FOLDED(64, 2, 8, 1): 1.0}),
            "HEADS dq C=64 L=256": sweep(("dq", True, 32), 256, 5, {plan.HeadsTile(64, 128, 8): 1.0}, now=None),
        }
    )
    headings = [line for line in said.splitlines() if line.endswith("TILES:")]
    assert headings == ["FOLDED_TILES:", "HEADS_TILES:", "TILES:"]
    assert pasted(said)["dx", True, 128] == FOLDED(64, 2, 8, 1) and "# kernels/self_attention.py" in said
    assert "now unknown" in comment(said, '("dq", True, 32)')


def test_what_must_be_checked_says_so():
    def dkv(groups: int) -> str:
        found = {"FOLDED dkv C=64 L=256": sweep(("dkv", True, 64), 256, 5, {FOLDED(64, groups, 4): 1.0})}
        return comment(text(found), '("dkv", True, 64)')

    assert "CHECK its gradients first" in dkv(2) and "CHECK" not in dkv(1)


def test_a_key_without_a_tile_for_all_of_its_shapes_is_left_alone():
    key, one, other = ("fwd", True, 256), FOLDED(32, 2, 8), FOLDED(16, 1, 4)
    found = {"FOLDED fwd L=16": sweep(key, 16, 5, {one: 1.0}), "FOLDED fwd L=4": sweep(key, 4, 1, {other: 1.0})}
    assert pasted(text(found)) == {} and "no tile was timed at every shape" in text(found)


def test_an_entry_that_nothing_beats_stays():
    said = text({"FOLDED fwd L=256": sweep(("fwd", True, 64), 256, 5, {FOLDED(64, 1, 4): 10.5})})
    assert pasted(said) == {} and "as it is, 50.0 us of 5 layers; the best of the others 52.5" in said


# ---- self-attention: several tiles of a key


@pytest.mark.parametrize("last", [128, 256])
def test_self_attention_gets_a_tile_for_each_number_of_positions(last, monkeypatch):
    key, before = ("bwd", True, 16), attention.TILES["bwd", True, 16]
    at_64 = {SELF(32, 16, 2): 1.0, SELF(64, 32, 2): 2.0}  # the first would be 256's, too: no 32 rows were timed there
    at_256 = {SELF(last, 32, 4): 3.0, SELF(64, 16, 8): 9.0}
    found = {"SELF bwd d=8 L=256": sweep(key, 256, 5, at_256), "SELF bwd d=16 L=64": sweep(key, 64, 5, at_64)}
    chosen = pasted(text(found))[key]
    monkeypatch.setitem(attention.TILES, key, chosen)
    assert attention.choose_tile("bwd", 2, 16, 64) == SELF(64, 32, 2)
    assert attention.choose_tile("bwd", 2, 8, 256) == SELF(last, 32, 4)
    assert attention.choose_tile("bwd", 2, 8, 16) == before[0]
    assert attention.choose_tile("bwd", 2, 8, 1024) == (before[-1] if last == 256 else SELF(128, 32, 4))


def test_one_tile_serves_two_shapes_and_more_positions_keep_theirs(monkeypatch):
    key, old = ("fwd", True, 32), attention.TILES["fwd", True, 32]
    a, b = SELF(16, 16, 1), SELF(16, 16, 2)
    found = {
        "SELF fwd d=32 L=16": sweep(key, 16, 5, {a: 2.0, b: 1.0}),
        "SELF fwd d=32 L=4": sweep(key, 4, 1, {a: 1.0, b: 2.0}),
    }
    chosen = pasted(text(found))[key]
    assert chosen == (b, *old[1:])
    assert "7.0 us of 6 layers" in comment(text(found), '("fwd", True, 32)')


def test_the_summary_says_where_they_are():
    found = {"FOLDED fwd L=256": sweep(("fwd", True, 64), 256, 5, {FOLDED(64, 1, 4): 1.0})}
    first, second = lines(found)
    assert first.endswith("ready to paste: tables.txt") and "(64, 1, 4, 2)" in second


def test_defaults_are_left_out_as_in_the_source():
    assert written(FOLDED(64, 1, 4, 2)) == "FoldedTile(64, 1, 4)"
    assert written(FOLDED(64, 1, 4, 1)) == "FoldedTile(64, 1, 4, 1)"
    assert written((SELF(16, 16, 1),)) == "(Tile(16, 16, 1),)"


def test_the_best_of_a_sweep_are_taken_for_a_while():
    fwd, dkv, dx = ((kernel, True, 64) for kernel in ("fwd", "dkv", "dx"))
    found = {
        "FOLDED fwd L=256": sweep(fwd, 256, 5, {FOLDED(128, 1, 8): 5.0, FOLDED(16, 1, 4): 9.0}),
        "FOLDED dkv L=256": sweep(dkv, 256, 5, {FOLDED(64, 2, 4): 1.0}),  # doubtful
        "FOLDED dx L=256": sweep(dx, 256, 5, {FOLDED(128, 1, 8): 9.8}),  # hardly faster
    }
    before = dict(plan.FOLDED_TILES)
    with pytest.raises(KeyError), taken(found) as said:
        assert plan.FOLDED_TILES == before | {fwd: FOLDED(128, 1, 8)}
        assert said == ["FOLDED ('fwd', True, 64): FoldedTile(128, 1, 8), 50.0 to 25.0 us"]
        raise KeyError
    assert before == plan.FOLDED_TILES


def test_a_sweep_that_ran_out_of_time_leaves_what_it_has(tmp_path, monkeypatch):
    lab, timed = Lab(tmp_path, tmp_path, cpu=True, end=time.monotonic() + 60), []
    tile, key = FOLDED(16, 1, 4), ("fwd", True, 64)
    asked = tiles.Sweep("FOLDED fwd C=64 L=256", plan.FOLDED_TILES, key, [tile, FOLDED(64, 1, 4)], lambda: 0, 5, 256)
    monkeypatch.setattr(tiles, "in_order", lambda lab: [asked])
    monkeypatch.setattr(tiles, "candidates", lambda lab, sweep: sweep.candidates)

    def replayed(run, device, **options):
        timed.append(plan.FOLDED_TILES[key])
        if len(timed) == 3:
            raise Late("out of time")
        return 1e-6 * len(timed)

    monkeypatch.setattr(tiles, "replayed", replayed)
    with pytest.raises(Late):
        tiles.measure(lab)
    assert lab.load("tiles")[asked.name]["us"] == {str(tuple(tile)): 2.0}
    assert "the best of the others 10.0" in (tmp_path / "tables.txt").read_text()


def test_what_the_sweep_brings_is_timed_and_checked(tmp_path, monkeypatch):
    every = [case for case in tiles.checks.cases(Lab(tmp_path, tmp_path, True, 0.0), 2) if "attention" in case.name]
    monkeypatch.setattr(tiles.checks, "cases", lambda lab, batch: every[-1:])
    monkeypatch.setattr(tiles, "repeated", lambda run, device: float(run()["loss"]))
    lab = Lab(tmp_path, tmp_path, cpu=True, end=time.monotonic() + 60)
    lab.save("tiles", {"FOLDED fwd L=256": sweep(("fwd", True, 64), 256, 5, {FOLDED(16, 1, 4): 1.0})})
    found = tiles.measure_tuned(lab)
    assert len(found["seconds"]) == 2 and len(found["changed"]) == 1 and all(r["ok"] for r in found["right"])
    said = tiles.tuned_lines(found)
    assert said[0].startswith("step with the tables as they are") and "0 wrong" in said[-1]
