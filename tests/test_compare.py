"""Methods side by side: equal cost, rows made once, tables that say who wins what."""

import json

import numpy as np
import pytest
import torch
from scipy import stats

from encdiff import InputError, open_dataset
from encdiff.errors import Stopped
from encdiff.experiments import compare as comparing
from encdiff.experiments.compare import compare, steps_for, time_steps
from encdiff.experiments.compared import SHOWN, read_rows, summarised, write_tables
from encdiff.experiments.methods import METHODS, REFERENCE, UNTRAINED
from encdiff.experiments.significance import bootstrap_interval, pairwise
from encdiff.training.runs import locked


@pytest.fixture(scope="module")
def room():
    return open_dataset("procedural:2,2,2,2,2,2", image_size=32)


@pytest.fixture
def scored(monkeypatch):
    """Made-up scores that depend on the model, in place of those that take long; what was scored."""
    seen = []

    def evaluated(model, data, *, metrics, protocol, **_):
        seen.append((protocol, tuple(metrics)))
        mean = float(next(model.parameters()).detach().abs().mean())
        result = {
            "factor_vae": {"eval_accuracy": mean}, "protocol": {"name": protocol, "seed": 0},
            "dci": {"disentanglement": mean / 2, "completeness": 0.5, "informativeness_test": 0.6, "importance": []},
        }  # fmt: skip
        if "counterfactual" in metrics:
            result["counterfactual"] = {k: 0.5 for k in ("exact", "arrived", "kept", "reconstructed", "psnr")}
        return result

    monkeypatch.setattr(comparing, "evaluate", evaluated)
    return seen


SMALL = {"steps": 4, "batch_size": 8, "seeds": 2, "protocols": ("quick", "heldout"), "say": lambda said: None}


def test_each_is_trained_once_at_each_cost_and_scored_by_each_protocol(room, scored, tmp_path, monkeypatch):
    costs = {"encdiff": 0.1, "annealvae": 0.05, "vectors": 0.104}
    monkeypatch.setattr(comparing, "time_steps", lambda makers, *_: {name: costs[name] for name in makers})
    chosen = ["encdiff", "annealvae", "vectors", "untrained"]
    rows = compare([room], tmp_path, methods=chosen, **SMALL | {"seeds": 1})
    made = [(row["method"], row["seed"], row["steps"], row["equal"]) for row in rows]
    both = ["seconds", "samples"]
    assert made == [
        *((name, 0, 4, both) for name in ("encdiff", "vectors")),
        *(("annealvae", 0, *of) for of in ((4, ["samples"]), (8, ["seconds"]))),
        ("untrained", 0, 0, both),
    ]
    assert [row["seconds"] for row in rows if row["method"] == "annealvae"] == pytest.approx([0.2, 0.4])
    assert {p for p, _ in scored} == {"quick", "heldout"} and len(scored) == 2 * len(rows)
    assert all(("counterfactual" in metrics) == (p == "quick") for p, metrics in scored[:8])
    assert {path.name for path in tmp_path.iterdir()} == {
        "rows", "runs", "settings.json", "costs.json", "compare.json", "compare.md",
        *(f"scores-procedural-2-2-2-2-2-2-{equal}.png" for equal in both), "cost-procedural-2-2-2-2-2-2.png",
    }  # fmt: skip
    log = (tmp_path / "runs" / "procedural-2-2-2-2-2-2-annealvae-8-seed0" / "log.csv").read_text()
    assert log.splitlines()[-1].startswith("8,")


def test_rows_are_not_made_again_even_without_their_runs(room, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "time_steps", lambda makers, *_: dict.fromkeys(makers, 1.0))
    few = SMALL | {"seeds": 1, "methods": ["untrained"]}
    before = compare([room], tmp_path, **few)
    count = len(scored)
    (path,) = (tmp_path / "rows").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"steps": -7}))
    assert [row["steps"] for row in compare([room], tmp_path, **few)] == [-7] != before and len(scored) == count
    for damage in ([], kept | {"seed": "0"}, kept | {"data": "room"}, kept | {"scores": {"quick": []}}):
        path.write_text(json.dumps(damage))
        with pytest.raises(InputError, match="is no row of a comparison; remove it to have it made$"):
            compare([room], tmp_path, **few)
    path.write_text(json.dumps(kept))
    path.with_name("again.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="is of the method, seed and cost of another row; remove one of them$"):
        compare([room], tmp_path, **few)


def test_two_grids_of_one_name_are_two_tables(scored, tmp_path):
    grids = [open_dataset(f"procedural:{n},2,2,2,2,2", image_size=32) for n in (2, 3)]
    compare(grids, tmp_path, methods=[UNTRAINED], **SMALL | {"seeds": 1, "protocols": ["quick"], "equal": ["samples"]})
    text = (tmp_path / "compare.md").read_text()
    assert "## procedural:2,2,2,2,2,2: equal samples" in text and "## procedural:3,2,2,2,2,2: equal samples" in text
    assert text.count("| untrained | 1 |") == 2


def test_a_folder_is_of_one_comparison_at_a_time(room, scored, tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="a training writes to it now, process"):
        compare([room], tmp_path, methods=[UNTRAINED], **SMALL)


@pytest.mark.parametrize("damage", [[1], {"seconds": {}}, {"seconds": {"encdiff": 0.0}}, {"seconds": {"encdiff": "1"}}])
def test_damaged_costs_are_refused(damage, room, scored, tmp_path):
    about = {"batch_size": 8, "device": "cpu", "threads": torch.get_num_threads()}
    (tmp_path / "costs.json").write_text(json.dumps(about | damage if isinstance(damage, dict) else damage))
    with pytest.raises(InputError, match="costs.json: (must hold the seconds of a step|is of other settings)"):
        compare([room], tmp_path, methods=["annealvae"], **SMALL)


def test_what_was_interrupted_goes_on(room, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "time_steps", lambda makers, *_: dict.fromkeys(makers, 1.0))
    train = type(METHODS["encdiff"]).train
    stops = [True]

    def stopped(self, *given, **by):
        if stops and self.name == "encdiff":
            stops.pop()
            raise Stopped("stopped after step 2")
        return train(self, *given, **by)

    monkeypatch.setattr(type(METHODS["encdiff"]), "train", stopped)
    few = SMALL | {"seeds": 1, "methods": ["untrained", "encdiff"]}
    with pytest.raises(Stopped, match="the same command continues"):
        compare([room], tmp_path, **few)
    assert [row["method"] for row in read_rows(tmp_path)] == ["untrained"]
    assert [row["method"] for row in compare([room], tmp_path, **few)] == ["encdiff", "untrained"]


def test_steps_at_equal_seconds():
    costs = {REFERENCE: 0.2, "fast": 0.08, "near": 0.19, "slow": 0.3, "very slow": 900.0}
    assert [steps_for(name, costs, 1000) for name in costs] == [1000, 2500, 1000, 667, 1]


def test_methods_that_come_later_are_timed_beside_the_reference(room, scored, tmp_path, monkeypatch):
    found = [{REFERENCE: 0.2, "annealvae": 0.1}, {REFERENCE: 0.4, "beta-vae": 0.3}]  # on a machine half as fast
    monkeypatch.setattr(comparing, "time_steps", lambda makers, *_: {name: found[0][name] for name in makers})
    monkeypatch.setattr(comparing, "_trained", lambda *_: METHODS["encdiff"].model())
    monkeypatch.setattr(comparing, "_score", lambda row, *_: row["scores"].update(quick={}, heldout={}))
    few = SMALL | {"seeds": 1}
    compare([room], tmp_path, methods=["annealvae"], **few)
    found.pop(0)
    compare([room], tmp_path, methods=["annealvae", "beta-vae"], **few)
    found.clear()
    compare([room], tmp_path, methods=["beta-vae", "annealvae"], **few)
    kept = json.loads((tmp_path / "costs.json").read_text())["seconds"]
    assert kept == pytest.approx({REFERENCE: 0.2, "annealvae": 0.1, "beta-vae": 0.15})


def test_steps_are_timed_in_turns(room):
    turns, spent = [], torch.randn(300, 300)

    def advance(name, count):
        def step(images, indices):
            assert images.shape == (6, 32, 32, 3) and images.dtype == torch.uint8 and len(indices) == 6
            turns.append(name)
            for _ in range(count):
                spent @ spent

        return step

    found = time_steps({"a": advance("a", 5), "b": advance("b", 60)}, room, 6, "cpu")
    assert found["b"] > 3 * found["a"] > 0 and turns[:12] == ["a"] * 3 + ["b"] * 3 + ["a"] * 3 + ["b"] * 3


def test_an_interval_is_that_of_resampled_means(rng):
    values = rng.normal(size=40)
    low, high = bootstrap_interval(values)
    error = values.std() / 40**0.5
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.25 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.25 * error)
    assert bootstrap_interval([0.3]) == (0.3, 0.3)


def test_pairs_are_tested_and_corrected_for_their_number(rng):
    values = {"a": rng.normal(0, 1, 9), "b": rng.normal(3, 2, 7), "c": rng.normal(0, 1, 8), "one": [5.0]}
    found = pairwise(values)
    assert len(found) == 3 and all("one" not in (test["a"], test["b"]) for test in found)
    for test in found:
        a, b = values[test["a"]], values[test["b"]]
        assert test["p"] == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue)
        assert test["difference"] == pytest.approx(a.mean() - b.mean())
    ps = [test["p"] for test in found]
    holm = [min(1, 3 * ps[0]), min(1, max(3 * ps[0], 2 * ps[1])), min(1, max(3 * ps[0], 2 * ps[1], ps[2]))]
    assert ps == sorted(ps) and [test["corrected"] for test in found] == pytest.approx(holm)
    same, other = pairwise({"x": [1, 1], "y": [1, 1]}), pairwise({"x": [1, 1], "y": [2, 2]})
    assert same[0]["p"] == other[0]["p"] == 1


def row(method: str, seed: int, **scores: float) -> dict:
    scores = {title: scores.get(short.replace(" ", "_"), 0.5) for title, short in SHOWN.items()}
    return {
        "method": method, "spec": "room", "data": {"name": "room", "sha256": "0"}, "seed": seed,
        "equal": ["seconds"], "steps": 10, "seconds": 3.0,
        "scores": {"paper": scores}, "protocols": {}, "batch_size": 8, "device": "cpu", "pairs": 4,
    }  # fmt: skip


def test_the_table_says_who_wins_what(tmp_path, rng):
    (tmp_path / "rows").mkdir()
    rows = [row("encdiff", s, DCI=0.8 + 0.01 * s, FactorVAE=0.9) for s in range(4)]
    rows += [row("annealvae", s, DCI=0.3 + 0.01 * s, FactorVAE=0.9 + 0.05 * rng.normal()) for s in range(4)]
    rows += [row("flow", s, DCI=0.81 + 0.02 * s, FactorVAE=0.9 + 0.05 * rng.normal()) for s in range(4)]
    for i, one in enumerate(rows):
        (tmp_path / "rows" / f"{i}.json").write_text(json.dumps(one))
    write_tables(tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "0.315 < (0.3" in text and "- DCI: **flow** 0.840; not told from it: encdiff." in text
    assert "- MIG: **encdiff** 0.500; not told from it: flow, annealvae." in text
    found = summarised(read_rows(tmp_path), "paper", "seconds")
    assert found["DCI disentanglement"]["encdiff"]["mean"] == pytest.approx(0.815)
    assert found["DCI disentanglement"]["encdiff"]["deviation"] == pytest.approx(np.std([0, 0.01, 0.02, 0.03], ddof=1))
    assert not summarised(read_rows(tmp_path), "paper", "samples")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": ["gan"]}, "method 'gan' is unknown, must be one of encdiff, adagn"),
        ({"equal": ["flops"]}, "equal is 'flops', must be among seconds, samples"),
        ({"protocols": ["papr"]}, "protocol is 'papr'"),
        ({"seeds": 0}, "must be at least one each"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(room, changes, said, tmp_path):
    with pytest.raises(InputError, match=said):
        compare([room], tmp_path / "out", **SMALL | changes)
    assert not (tmp_path / "out").exists()


def test_data_must_be_a_grid_of_the_methods_size(room, tmp_path):
    with pytest.raises(InputError, match="images of 16, the methods take 32$"):
        compare([open_dataset("procedural:2,2,2,2,2,2", image_size=16)], tmp_path, **SMALL)
    with pytest.raises(InputError, match="must be at least one each"):
        compare([], tmp_path, **SMALL)


def test_rows_of_other_settings_or_other_data_are_not_mixed(room, scored, tmp_path):
    few = SMALL | {"methods": [UNTRAINED], "seeds": 1}
    compare([room], tmp_path, **few)
    for changes, said in (({"batch_size": 9}, "batch_size 8"), ({"steps": 5}, "steps 4"), ({"pairs": 3}, "pairs 64")):
        with pytest.raises(InputError, match=f"settings.json: is of {said}, cannot go on with .*; use another folder$"):
            compare([room], tmp_path, **few | changes)
    (path,) = (tmp_path / "rows").iterdir()
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"data": kept["data"] | {"sha256": "0"}}))
    with pytest.raises(InputError, match="is of other images than procedural; use another folder, or rename the data$"):
        compare([room], tmp_path, **few)


def test_a_further_protocol_or_cost_completes_the_rows(room, scored, tmp_path, monkeypatch):
    monkeypatch.setattr(comparing, "time_steps", lambda makers, *_: dict.fromkeys(makers, 1.0))
    few = SMALL | {"methods": ["annealvae"], "seeds": 1, "steps": 1}
    compare([room], tmp_path, **few | {"protocols": ["quick"], "equal": ["samples"]})
    (begun,) = read_rows(tmp_path)
    assert begun["equal"] == ["samples"] and list(begun["scores"]) == ["quick"]
    (found,) = compare([room], tmp_path, **few)
    assert found["equal"] == ["seconds", "samples"] and list(found["scores"]) == ["quick", "heldout"]
    assert [protocol for protocol, _ in scored] == ["quick", "heldout"] and found["scores"]["quick"] == begun["scores"][
        "quick"
    ]
    assert "swaps exact" in found["scores"]["quick"] and "swaps exact" not in found["scores"]["heldout"]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_steps(name, room):
    images = torch.from_numpy(room.images(range(4)))
    terms = METHODS[name].steps(4, "cpu")(images, torch.arange(4))
    assert np.isfinite(float(terms["loss"])) and METHODS[name].model().config.image_size == 32
