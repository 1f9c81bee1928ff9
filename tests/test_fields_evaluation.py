"""Scores of methods side by side: the same sensors for all, a table that JSON holds, pictures."""

import json

import numpy as np
import pytest
from _fields import CONFIG, TIMED, Fields, field_model, some_sensors

from encdiff.errors import InputError
from encdiff.fields import evaluate_fields, of_baseline, of_model, reconstruction_picture
from encdiff.fields.model import summarised
from encdiff.fields.output import markdown, report_rows, write_evaluation

GRID = CONFIG.grid
COUNT = 6


@pytest.fixture(scope="module")
def data():
    return Fields(10)


def oracle(data, noise=0.0, members=1):
    """A method that knows the truth, and adds noise to each member."""

    def method(sensors, _, seed):
        truth = data.read(range(len(data) - len(sensors), len(data)))
        drawn = np.random.default_rng(seed).normal(size=(len(truth), members, *GRID.shape))
        return truth[:, None] + noise * drawn * np.array(CONFIG.std)[:, None, None]

    return method


def rows_of(method, data, **options):
    options = {"observed": [0.05], "noise": [0.0], "count": COUNT} | options
    return evaluate_fields({"it": method}, data, **options)["rows"]


def test_the_truth_scores_zero(data):
    (row,) = rows_of(oracle(data), data)
    for name in ("nrmse", "nrmse_unobserved", "crps", "error"):
        assert row[name]["mean"] == 0 and row[name]["interval"] == [0, 0], name
        assert row[name]["channels"] == {"a": 0, "b": 0}
    assert row["coverage"] is None and row["spread"] is None  # one member has no band
    assert "curve" not in row and "spread_to_error" not in row
    assert row["seconds_per_field"] > 0 and (row["observed"], row["noise"]) == (0.05, 0.0)


def test_what_errors_are_measured_in(data):
    """nRMSE in the truth's root mean square, CRPS and error in the channel's deviations over the data."""
    truth, (_, std) = data.read(range(4, 10)).astype(float), data.statistics()
    off = lambda *_: (truth + std[:, None, None])[:, None]  # noqa: E731
    (row,) = rows_of(off, data)
    assert row["crps"]["channels"] == pytest.approx({"a": 1, "b": 1}) and row["error"]["mean"] == pytest.approx(1)
    by_hand = (std / np.sqrt((truth**2).mean((2, 3)))).mean(0)
    assert list(row["nrmse"]["channels"].values()) == pytest.approx(by_hand.tolist())
    assert row["nrmse"]["mean"] == pytest.approx(by_hand.mean())


def test_an_ensemble_about_the_truth(data):
    (row,) = rows_of(oracle(data, 0.1, members=25), data)
    assert row["nrmse"]["mean"] < 0.1 and row["spread"]["mean"] == pytest.approx(
        0.1 * np.mean(np.array(CONFIG.std) / data.statistics()[1]), rel=0.05
    )
    assert row["coverage"]["mean"] == pytest.approx(1, abs=0.01)  # the truth is the ensemble's middle
    assert all(ratio > 3 for ratio in row["spread_to_error"].values())


def test_every_method_is_given_the_same_sensors(data):
    seen: dict = {"one": [], "other": []}

    def method(name):
        def look(sensors, members, seed):
            seen[name].append((sensors, members, seed))
            return np.zeros((len(sensors), 1, *GRID.shape))

        return look

    told = []
    evaluate_fields(
        {name: method(name) for name in seen}, data, observed=[0.01, 0.1], noise=[0, 0.2], count=COUNT, members=7,
        seed=3, progress=lambda *how: told.append(how),
    )  # fmt: skip
    assert told == [(i, 8) for i in range(1, 9)] and len(seen["one"]) == len(seen["other"]) == 4
    truth, std = data.read(range(4, 10)).reshape(COUNT, 2, -1), data.statistics()[1]
    for (mine, *rest), (theirs, *others) in zip(seen["one"], seen["other"], strict=True):
        assert rest == others == [7, 3] and all(a is b for a, b in zip(mine, theirs, strict=True))
    for (sensors, *_), (share, level) in zip(seen["one"], [(s, n) for s in (0.01, 0.1) for n in (0, 0.2)], strict=True):
        assert [len(one) for one in sensors] == [round(share * 256)] * COUNT
        assert all(np.allclose(one.sigma, level * std) for one in sensors)
        off = np.stack([(s.values - t[:, GRID.cells(s.points)].T) / std for s, t in zip(sensors, truth, strict=True)])
        assert off.std() == pytest.approx(level, rel=0.2) if level else not off.any()
        assert len({one.points.tobytes() for one in sensors}) == COUNT


def test_unobserved_pixels_alone(data):
    """A method that is right at the sensors is not better where there are none."""
    (nearest,) = rows_of(of_baseline("nearest", GRID), data, observed=[0.5])
    share = nearest["nrmse"]["mean"] / nearest["nrmse_unobserved"]["mean"]
    assert share == pytest.approx(0.5**0.5, rel=0.02)  # half of the squares are 0


def test_numbers_that_are_none_are_null(data, tmp_path):
    def silent(sensors, members, seed):
        found = np.random.default_rng(seed).normal(size=(len(sensors), members, *GRID.shape))
        found[:, :, 1] = np.nan
        return found

    result = evaluate_fields(
        {"silent": silent, "nearest": of_baseline("nearest", GRID)}, data, observed=[0.05], noise=[0], count=2,
        members=3,
    )  # fmt: skip
    paths = write_evaluation(tmp_path / "made", result)

    def refuse(name):
        raise AssertionError(f"{name} in the file")

    again = json.loads((tmp_path / "made" / "fields.json").read_text(), parse_constant=refuse)
    row = again["rows"][0]
    assert row["nrmse"]["mean"] is None and row["nrmse"]["channels"]["b"] is None
    assert row["nrmse"]["channels"]["a"] > 0 and "| 0 % | silent | - |" in markdown(again)
    assert again == json.loads(json.dumps(result)) and all(path.stat().st_size for path in paths)


def test_table_and_files(data, tmp_path):
    model = field_model()
    methods = {"ours": of_model(model, steps=2), "nearest": of_baseline("nearest", GRID)}
    result = evaluate_fields(methods, data, observed=[0.02, 0.1], noise=[0.0], count=2, members=3)
    header, rows = report_rows(result)
    assert [row[:3] for row in rows] == [[m, s, "0 %"] for s in ("2 %", "10 %") for m in ("ours", "nearest")]
    assert all(len(row) == len(header) for row in rows) and rows[1][6:8] == ["-", "-"]
    names = {path.name for path in write_evaluation(tmp_path, result)}
    assert names == {"fields.json", "fields.md", "errors.png", "crps.png", "calibration.png"}
    assert result["data"]["name"] == "fields" and result["data"]["channels"] == ["a", "b"]
    assert result["protocol"]["count"] == 2
    plain = evaluate_fields({"nearest": methods["nearest"]}, data, observed=[0.02], noise=[0.0], count=2)
    assert not any(path.name == "calibration.png" for path in write_evaluation(tmp_path / "plain", plain))


def test_a_model_is_asked_for_the_last_frame(monkeypatch):
    """Whatever the time of the latest sensor."""
    data, asked = Fields(3, TIMED.grid, np.array([0.0, 3.0, 4.0])), []
    model = field_model(TIMED)
    drawn = model.reconstruct
    monkeypatch.setattr(model, "reconstruct", lambda *a, **k: asked.append(k["time"]) or drawn(*a, **k))
    rows_of(of_model(model, data, steps=1), data, observed=[0.004], count=3, members=1, memory=2.0)
    assert asked == [4.0]


def test_members_that_are_quantiles_say_so(data):
    """By the method, not by its name: Kriging's band is read as of quantiles, a model's that is called so is not."""
    exact = of_baseline("kriging", GRID)
    (quantiles,) = rows_of(exact, data, observed=[0.05], noise=[0.1], count=2, members=5)
    (draws,) = rows_of(lambda *given: exact(*given), data, observed=[0.05], noise=[0.1], count=2, members=5)
    assert quantiles["nrmse"] == draws["nrmse"] and quantiles["spread_to_error"] != draws["spread_to_error"]


def test_fields_in_time():
    """The last frame is looked for, with what frames before it told; only what is of its time is observed."""
    times = np.array([0.0, 1.0, 2.0, 3.0])
    data, seen = Fields(5, TIMED.grid, times), []

    def method(sensors, members, seed):
        seen.extend(sensors)
        return data.read([3, 4])[:, None, -1]

    (row,) = rows_of(method, data, observed=[0.2], count=2, memory=1.5)
    assert row["nrmse"]["mean"] == 0 and {float(t) for one in seen for t in one.times} == {2.0, 3.0}
    model = field_model(TIMED)
    (row,) = rows_of(of_model(model, steps=2), data, count=2, members=2, memory=TIMED.memory)
    assert row["nrmse_unobserved"]["mean"] > 0 and row["spread_to_error"].keys() == {"a"}


def test_refusals(data):
    with pytest.raises(InputError, match="count is 11, must be 1 to 10, the fields of fields"):
        rows_of(oracle(data), data, count=11)
    with pytest.raises(InputError, match="observed is 1.5, must be a share"):
        rows_of(oracle(data), data, observed=[1.5])
    with pytest.raises(InputError, match="method is 'spline', must be one of nearest, linear, cubic, kriging"):
        of_baseline("spline", GRID)


def test_pictures_of_little():
    """Two members; a channel that is measured nowhere, in time; a regression."""
    sensors = some_sensors(times=np.arange(9.0))
    sensors.values[:, 1] = np.nan
    members = np.random.default_rng(0).normal(size=(2, 2, 16, 16))
    figure = reconstruction_picture(summarised(members), GRID, sensors)
    assert [axis.get_title() for axis in figure.axes[:5]] == ["9 sensors", "mean", "spread", "member 1", "member 2"]
    figure = reconstruction_picture(summarised(members[:1]), GRID, sensors, members[1])
    assert [axis.get_title() for axis in figure.axes[:4]] == [
        "truth",
        "9 sensors",
        "reconstruction",
        "error of the mean",
    ]
