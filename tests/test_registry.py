import json

import numpy as np
import pytest
from _codes import BAD_IDS, BAD_ROWS, BINARY, GRID, IDENTITY, halves

from encdiff.errors import InputError
from encdiff.metrics import METRICS, mig, sap, score
from encdiff.metrics.samples import split_rows

VOTES = dict(num_train=100, num_eval=100, batch_size=8)
OPTIONS = {"factor_vae": VOTES, "beta_vae": VOTES, "downstream": {"sizes": (20, 50)}}
CODES = BINARY @ np.random.RandomState(0).standard_normal((3, 4))


@pytest.fixture(scope="module")
def results():
    told = []
    scores = score(
        METRICS,
        CODES,
        BINARY,
        options=OPTIONS,
        n_jobs=1,
        progress=lambda name, done, total: told.append((name, done, total)),
    )
    return scores, told


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_its_headline_for_json(results, name):
    result = results[0][name]
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    if name == "unsupervised":  # four codes that are linear in three factors
        assert result["total_correlation"] is None and "singular" in result["undefined"]
    else:
        assert 0 <= result[METRICS[name].headline] <= (1.5 if name == "tad" else 1)
    total = {"dci": 3, "dci_quick": 3, "downstream": 6}.get(name, 1)
    assert [step for step in results[1] if step[0] == name][-1] == (name, total, total)


def test_without_test_rows_a_fifth_is_held_out():
    x, y, x_test, y_test = split_rows(IDENTITY, GRID, 7)
    assert METRICS["sap"](IDENTITY, GRID, seed=7)["sap"] == sap(x, y, x_test, y_test)["sap"]
    assert METRICS["mig"](IDENTITY, GRID)["mig"] == mig(IDENTITY, GRID)["mig"], "nothing is fitted: all rows"


def test_test_rows_are_what_is_scored():
    x, y, x_test, y_test = halves(IDENTITY)
    both = score(["sap", "mig"], x, y, test_codes=x_test, test_factors=y_test)
    assert both["sap"]["sap"] == sap(x, y, x_test, y_test)["sap"]
    assert both["mig"]["mig"] == mig(x_test, y_test)["mig"]
    with pytest.raises(InputError, match="given together"):
        score(["sap"], x, y, test_codes=x_test)


def test_seeds_are_kept_apart_and_repeat():
    first, again, other = (
        score(["factor_vae"], CODES, BINARY, seed=seed, options=OPTIONS)["factor_vae"] for seed in (1, 1, 2)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "given", [{"names": ["mig", "fid"]}, {"names": ["mig"], "options": {"fid": {}}}], ids=["name", "option"]
)
def test_unknown_metric(given):
    with pytest.raises(InputError, match="^metric is 'fid'; it must be one of factor_vae, beta_vae, dci, ") as error:
        score(given.pop("names"), CODES, BINARY, **given)
    assert all(name in str(error.value) for name in METRICS)


@pytest.mark.parametrize("codes, factors, message", BAD_ROWS, ids=BAD_IDS)
def test_bad_rows_are_refused_before_anything_is_computed(codes, factors, message):
    with pytest.raises(InputError, match=message):
        score(METRICS, codes, factors, progress=lambda *step: pytest.fail("computed"))


def test_factor_names_are_used():
    with pytest.raises(InputError, match="factor hue is constant"):
        score(["mig"], IDENTITY, GRID * [0, 1, 1, 1], factor_names=("hue", "size", "shape", "angle"))
    with pytest.raises(InputError, match="factor 3 is constant"):  # of names, fewer than factors
        score(["mig"], IDENTITY, GRID * [1, 1, 1, 0], factor_names=("hue",))
