"""Swaps and traversals judged by true images: models whose answers are known, an independent judge, bad input."""

import io
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from _place import DEVICE
from _tiny import TINY
from rich.console import Console
from scipy.stats import binomtest

from encdiff import EncDiff, InputError, evaluate, open_dataset
from encdiff.data import Dataset, SubGrid, to_float
from encdiff.evaluation import counterfactual, format_swaps, judge, read_scores, traversal_effects, write_metrics
from encdiff.evaluation.drawn import DRAWN
from encdiff.metrics.counterfactual import blurred, closeness, explained_variance, nearest, swap_rates, wilson_interval

NAMES = ["floor hue", "wall hue", "object hue", "scale", "shape", "orientation"]
SIZES = (3, 2, 2, 2, 4, 3)


@pytest.fixture(scope="module")
def room():
    return open_dataset("procedural:" + ",".join(map(str, SIZES)), 16)


class Oracle:
    """Codes are the factors and a constant, in the order of `columns`; images are drawn from them without a fault."""

    def __init__(self, room: Dataset, join: tuple[int, ...] = ()):
        self.room, self.join = room, join
        self.everything = room.images(np.arange(len(room)))

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        factors = self.room.factors(nearest(images, [self.everything]))
        codes = np.c_[factors, np.zeros(len(factors))].astype(np.float32)
        if self.join:  # the first concept of these stands for all of them
            codes[:, self.join[0]] = np.ravel_multi_index(factors[:, self.join].T, [SIZES[f] for f in self.join])
        return torch.from_numpy(codes)

    def draw(self, codes: torch.Tensor) -> torch.Tensor:
        values = codes.round().long().numpy()
        factors = values[:, :6].copy()
        if self.join:
            parts = np.unravel_index(values[:, self.join[0]], [SIZES[f] for f in self.join])
            factors[:, self.join] = np.stack(parts, 1)
        return to_float(self.room.images(self.room.indices(factors)))


def judged(oracle: Oracle, **options) -> dict:
    return counterfactual(oracle.encode, oracle.room, **{"draw": oracle.draw, "pairs": 24} | options)


def test_a_model_without_faults_gets_one(room):
    told = []
    found = judged(Oracle(room), progress=lambda *step: told.append(step))
    assert found["exact"] == found["arrived"] == found["kept"] == found["reconstructed"] == 1.0
    assert found["psnr"] == pytest.approx(100) and found["reconstruction"]["error"] < 1e-6
    assert list(found["factors"]) == NAMES and found["pairs"] == 24
    for f, swap in enumerate(found["factors"].values()):
        assert swap["concepts"] == [f] and swap["pairs"] == 24 and swap["psnr"] == pytest.approx(100)
        assert swap["exact_interval"] == pytest.approx([24 / (24 + 1.96**2), 1.0], abs=1e-3)
    assert told[-1] == ("judge", len(room), len(room)) and ("draw", 7 * 24, 7 * 24) in told
    assert json.loads(json.dumps(found)) == found


def test_a_model_that_ignores_the_source_keeps_all_and_lets_nothing_arrive(room):
    found = judged(Oracle(room), groups={name: [6] for name in NAMES})  # a concept that holds nothing
    assert (found["arrived"], found["kept"], found["exact"]) == (0.0, 1.0, 0.0)
    nobody = judged(Oracle(room), groups={})
    assert (nobody["arrived"], nobody["kept"]) == (0.0, 1.0)
    assert {swap["undefined"] for swap in nobody["factors"].values()} == {"no concept carries it"}


def test_factors_that_share_a_concept_arrive_together(room):
    oracle = Oracle(room, join=(3, 4))
    found = judged(oracle, groups={"scale": [3], "shape": [3], "wall_hue": [1]})["factors"]
    for name in ("scale", "shape"):  # source and target differ in both, so the other comes with it
        assert (found[name]["arrived"], found[name]["kept"], found[name]["exact"]) == (1.0, 0.0, 0.0)
    assert found["wall hue"]["exact"] == 1.0


def test_importance_says_which_concepts_are_swapped(room):
    crossed = np.zeros((7, 6))
    crossed[3, 4] = crossed[4, 3] = 1  # the wrong way round
    found = judged(Oracle(room), importance=crossed)["factors"]
    assert found["scale"]["concepts"] == [4] and found["shape"]["concepts"] == [3]
    assert found["scale"]["arrived"] == 0.0 == found["shape"]["kept"]


def test_pairs_differ_in_every_factor_and_each_value_comes(room):
    sources, targets = room.pairs(500, seed=3)
    of_source, of_target = room.factors(sources), room.factors(targets)
    assert (of_source != of_target).all()
    assert all(set(of_source[:, f]) == set(range(size)) for f, size in enumerate(SIZES))
    single = SubGrid(room, (3, 1, 1, 1, 1, 1))
    sources, targets = single.pairs(20)
    assert (single.factors(sources)[:, 1:] == single.factors(targets)[:, 1:]).all() and (sources != targets).all()


def test_given_pairs_count_where_they_differ(room):
    a, b = room.indices([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]])
    found = judged(Oracle(room), pairs=[(a, b), (a, a)])
    assert found["pairs"] == 2 and found["factors"]["scale"]["pairs"] == 1 and found["exact"] == 1.0
    assert found["factors"]["shape"] == {"undefined": "no pair differs in it", "concepts": [4]}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(format_swaps(found))
    assert "no pair differs in it" in console.export_text()


def test_the_judge_takes_any_chunk(room, monkeypatch):
    whole = judged(Oracle(room), groups={"shape": [3]})
    monkeypatch.setattr(judge, "CHUNK", 7)
    monkeypatch.setattr(judge, "BATCH", 5)
    assert judged(Oracle(room), groups={"shape": [3]}) == whole


@pytest.mark.on_gpu
def test_nearest_is_that_of_float64():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 256, (301, 6, 6, 3), np.uint8)
    images = torch.from_numpy(rng.uniform(-1, 1, (40, 3, 6, 6))).float()
    flat = images.permute(0, 2, 3, 1).reshape(40, -1).double().cpu().numpy()
    distances = ((flat[:, None] - (true.reshape(301, -1) / 127.5 - 1)) ** 2).sum(2)
    for size in (1, 13, 301):
        batches = (true[i : i + size] for i in range(0, 301, size))
        assert nearest(images.to(DEVICE), batches).tolist() == distances.argmin(1).tolist()
    twice = np.concatenate([true, true])
    assert nearest(to_float(true[::50]), [twice]).tolist() == list(range(0, 301, 50)), "of equals the first"


def test_rates_and_intervals_by_hand():
    wanted = np.array([[0, 1], [0, 1], [2, 0], [1, 1]])
    read = np.array([[0, 1], [1, 1], [2, 1], [0, 0]])
    rates = swap_rates(read, wanted, 0)
    assert (rates["arrived"], rates["kept"], rates["exact"]) == (0.5, 0.5, 0.25)
    for hits, trials in ((0, 5), (3, 7), (128, 128)):
        expected = binomtest(hits, trials).proportion_ci(method="wilson")
        assert wilson_interval(hits, trials) == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_closeness_and_blur_by_hand():
    images = torch.zeros(2, 3, 8, 8)
    found = closeness(images, images + 0.2)
    assert found == {"psnr": pytest.approx(20), "error": pytest.approx(0.2)}
    ramp = torch.linspace(-1, 1, 8).expand(1, 3, 8, 8)
    assert blurred(ramp, 1).equal(ramp)
    assert blurred(ramp, 4)[..., 0].mean() == pytest.approx(ramp[..., :4].mean().item())


def test_explained_variance_of_known_codes():
    factors = np.stack(np.unravel_index(np.arange(12), (3, 4)), 1)
    codes = np.c_[factors[:, 0], factors[:, 1] ** 2, np.ones(12), factors.sum(1)].astype(np.float32)
    shares = explained_variance(codes, factors)
    both = np.array([factors[:, 0].var(), factors[:, 1].var()])
    np.testing.assert_allclose(shares, [[1, 0], [0, 1], [0, 0], both / both.sum()], atol=1e-12)


def test_a_scalar_of_one_factor_moves_that_one_alone(room):
    oracle = Oracle(room)
    found = traversal_effects(oracle.encode, room, draw=oracle.draw, images=3, values=5)
    np.testing.assert_allclose(found["effect"], np.eye(7, 6), atol=1e-12)
    assert found["purity"] == found["reach"] == 1.0 and (found["images"], found["values"]) == (3, 5)
    single = SubGrid(room, (3, 2, 2, 2, 4, 1))
    narrow = Oracle(single)
    assert traversal_effects(narrow.encode, single, draw=narrow.draw, images=2, values=5)["reach"] == 1.0
    joined = Oracle(room, join=(3, 4))
    effect = traversal_effects(joined.encode, room, draw=joined.draw, images=3, values=8)["effect"]
    assert effect[3][3] == effect[3][4] == 1.0, "one scalar moves both"


def test_of_a_model_it_is_one_of_the_scores(room, tmp_path, monkeypatch):
    monkeypatch.setitem(
        DRAWN, "traversal", DRAWN["traversal"]._replace(function=partial(traversal_effects, steps=1, values=2))
    )
    model, told = EncDiff(TINY).train(), set()
    options = dict(factor_vae_variance=100, factor_vae_train=50, factor_vae_eval=50)
    names = ("factor_vae", "counterfactual", "traversal")
    result = evaluate(model, room, metrics=names, pairs=3, progress=lambda *step: told.add(step[0]), **options)
    assert model.training, "in the mode that it was in"
    assert result["counterfactual"]["judge"]["first stage"] == 1.0, "space to depth loses nothing"
    assert {"counterfactual draw", "counterfactual judge", "traversal draw"} <= told
    write_metrics(tmp_path / "metrics.json", {"trained": result})
    assert read_scores(tmp_path / "metrics.json")["trained"]["traversal"].keys() >= {"purity", "reach", "effect"}
    assert counterfactual(model, room, pairs=3) == result["counterfactual"], "no DCI to say which concepts are whose"


def test_what_cannot_be_drawn_is_refused_before_anything_is_computed(room):
    model, told = EncDiff(TINY), []
    for given, data, pairs, message in (
        (model.encode, room, 1, "metrics: counterfactual is of what a model draws, encode must be a ConceptModel"),
        (model, Twins(16, (2, 2, 2, 2, 2, 2)), 1, "no complete grid of factors with one image each, which judges"),
        (model, room, 0, "pairs is 0"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(
                given, data, metrics=["counterfactual", "mig"], pairs=pairs, protocol="heldout",
                progress=lambda *step: told.append(step),
            )  # fmt: skip
    assert not told


def test_a_model_in_bfloat16_is_judged(room):
    assert counterfactual(EncDiff(TINY).to(torch.bfloat16), room, pairs=2, steps=1)["judge"]["first stage"] == 1.0


def test_concepts_that_are_vectors_are_swapped_whole(room):
    model, given = EncDiff(replace(TINY, concept_width=2)).eval(), []

    def draw(codes: torch.Tensor) -> torch.Tensor:
        given.append(codes)
        return torch.zeros(len(codes), 3, 16, 16)

    pair = tuple(int(rows[0]) for rows in room.pairs(1))
    counterfactual(model, room, draw=draw, pairs=[pair], groups={"scale": [1]})
    source, target = (model.encode(to_float(room.images([index])))[0] for index in pair)
    codes = torch.cat(given)  # of the reconstruction, then of the six factors
    assert codes[4, 1].equal(source[1]) and codes[4, [0, 2]].equal(target[[0, 2]]) and codes[0].equal(target)
    assert np.shape(traversal_effects(model, room, images=1, values=2, steps=1)["effect"]) == (3, 6)


class Twins(type(open_dataset("procedural:2,2,2,2,2,2", 16))):
    instances = 2


def test_what_cannot_be_judged_is_refused(room):
    oracle, model = Oracle(room), EncDiff(TINY)
    for message, call in {
        "draw is None, must be a function": lambda: counterfactual(oracle.encode, room),
        "procedural: images of 32, the model takes 16": lambda: counterfactual(
            model, open_dataset("procedural:2,2,2,2,2,2", 32)
        ),
        "no complete grid of factors": lambda: counterfactual(model, Twins(16, (2, 2, 2, 2, 2, 2))),
        "draw gave ndarray, must give a torch.Tensor": lambda: judged(oracle, draw=lambda codes: codes.numpy()),
        "draw gave torch.float32 up to 255, must be floating point in": lambda: judged(
            oracle, draw=lambda codes: 127.5 * (1 + oracle.draw(codes))
        ),
        "draw gave torch.uint8": lambda: judged(oracle, draw=lambda codes: oracle.draw(codes).to(torch.uint8)),
        r"draw gave \(64, 3, 8, 8\), must give": lambda: judged(oracle, draw=lambda c: torch.zeros(len(c), 3, 8, 8)),
        r"encode gave codes \(24, 2\), must give": lambda: counterfactual(
            lambda images: torch.full((len(images), 2), torch.nan), room, draw=oracle.draw, pairs=24
        ),
        "draw is a int, must be a function": lambda: counterfactual(oracle.encode, room, draw=3),
        "seed is -1": lambda: judged(oracle, seed=-1),
        "concept 0.5 of scale": lambda: judged(oracle, groups={"scale": [0.5]}),
        "groups are .1., must be a dict of lists": lambda: judged(oracle, groups=[1]),
        r"importance is \(9, 6\), must be 7 rows": lambda: judged(oracle, importance=np.ones((9, 6))),
        r"importance is \(7, 6\), must be 7 rows of finite": lambda: judged(oracle, importance=np.full((7, 6), np.nan)),
        r"pairs are \[\(0, 1\), \(2,\)\], must be a number": lambda: judged(oracle, pairs=[(0, 1), (2,)]),
        "there is no factor 'size'": lambda: judged(oracle, groups={"size": [0]}),
        r"concept 7 of scale, must be an integer in 0..6": lambda: judged(oracle, groups={"scale": [7]}),
        "source and target of every pair are equal": lambda: judged(oracle, pairs=[(3, 3), (5, 5)]),
        r"pairs are \[1, 2, 3\], must be a number": lambda: judged(oracle, pairs=[1, 2, 3]),
        "indices: 5..99999": lambda: judged(oracle, pairs=[(0, 5), (0, 99999)]),
        "pairs is 0": lambda: judged(oracle, pairs=0),
        "every factor has a single value": lambda: counterfactual(
            oracle.encode, SubGrid(room, (1,) * 6), draw=oracle.draw
        ),
        r"importance is \(3,\)": lambda: judged(oracle, importance=np.zeros(3)),
        "values is 1": lambda: traversal_effects(oracle.encode, room, draw=oracle.draw, values=1),
    }.items():
        with pytest.raises(InputError, match=message):
            call()
    for images, batches, message in (
        (torch.zeros(2, 3, 4, 4), [], "there is no true image"),
        (torch.full((2, 3, 4, 4), torch.nan), [np.zeros((1, 4, 4, 3), np.uint8)], "are not finite"),
        (torch.zeros(2, 3, 4, 4), [np.zeros((1, 5, 5, 3), np.uint8)], r"must be uint8 \(b, S, S, 3\), S 4"),
        (torch.zeros(2, 3, 4), [], "must be floating point"),
    ):
        with pytest.raises(InputError, match=message):
            nearest(images, batches)
