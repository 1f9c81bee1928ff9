import json

import pytest

from bench.report import (
    BadFile,
    baselines,
    cases,
    changes,
    device_of,
    duration,
    main,
    markdown,
    merge,
    read,
    stored_run,
)

CPU = {"cpu": {"brand_raw": "A CPU"}, "threads": 2, "gpu": None, "torch": "2.13", "python_version": "3.11"}
GPU = CPU | {"gpu": "NVIDIA H200"}


def benchmark(impl: str, median: float, dtype: str = "torch.float32", shape: str = "B=16", **info) -> dict:
    labels = {"op": "unet", "phase": "forward", "shape": shape, "dtype": dtype, "impl": impl}
    return {"name": impl, "stats": {"median": median, "data": [median] * 3}, "extra_info": labels | info}


def a_run(*benchmarks: dict, machine: dict = CPU, datetime: str = "2026-01-01") -> dict:
    commit = {"id": "0123456789abcdef", "dirty": True}
    return {"machine_info": machine, "commit_info": commit, "datetime": datetime, "benchmarks": list(benchmarks)}


RUN = a_run(
    benchmark("ours", 0.25, launches=12, peak_memory=3 * 2**20, percent_of_bound=12.3, samples_per_second=64.0),
    benchmark("published", 0.5),
    benchmark("published_compiled", 0.4),
    benchmark("diffusers", 0.3),
    benchmark("ours", 0.1, dtype="torch.bfloat16"),
    {"name": "another", "stats": {"median": 1.0}, "extra_info": {}},
)


@pytest.fixture
def write(tmp_path):
    def to(name: str, run: dict):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(run))
        return path

    return to


def table(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_ratios_are_of_the_medians_of_the_same_dtype():
    header, _, bf16, published, ours, diffusers, compiled = table(markdown(RUN))
    assert header[:5] == ["impl", "dtype", "time", "vs published", "vs best stock"]
    assert bf16[:5] == ["ours", "bfloat16", "100 ms", "", ""]
    assert published[:5] == ["published", "float32", "500 ms", "1.00", "0.60"]
    assert ours[:5] == ["ours", "float32", "250 ms", "2.00", "1.20"]
    assert ours[5:] == ["", "64", "12", "3", "", "", "12.3"]
    assert (diffusers[3], compiled[3]) == ("1.67", "1.25")


def test_the_clock_of_a_gpu_goes_before_the_median_of_the_calls():
    found = cases(a_run(benchmark("ours", 0.5, seconds=0.125)))
    assert [case.seconds for case in found] == [0.125]


def test_what_the_host_takes_is_a_column_and_times_by_events_are_marked():
    graph = benchmark("ours", 1.0, seconds=2e-5, timed="graph", eager_seconds=2e-4)
    events = benchmark("published", 1.0, seconds=0.25, timed="events", eager_seconds=0.125)
    header, _, published, ours = table(markdown(a_run(graph, events)))
    assert (published[2], ours[2]) == ("250 ms, events", "20 us")
    assert (published[header.index("eager host")], ours[header.index("eager host")]) == ("125 ms", "200 us")


def test_heading_names_device_versions_and_commit():
    text = markdown(RUN)
    for part in ("A CPU, 2 threads", "Python 3.11", "torch 2.13", "0123456789ab with changes"):
        assert part in text


def test_eager_stands_for_the_published_form_of_an_op_without_one():
    assert baselines(cases(a_run(benchmark("eager", 2.0), benchmark("compiled", 3.0)))) == (2.0, 3.0)
    assert baselines(cases(a_run(benchmark("ours", 2.0)))) == (None, None)


@pytest.mark.parametrize("seconds, text", [(2, "2 s"), (0.0123, "12.3 ms"), (4.567e-5, "45.7 us"), (3e-8, "0.03 us")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_changes_beyond_a_tenth_are_listed_greatest_first():
    before = a_run(benchmark("ours", 0.2), benchmark("published", 0.5), benchmark("sdpa", 0.1))
    now = a_run(benchmark("ours", 0.23), benchmark("published", 0.54), benchmark("sdpa", 0.05), benchmark("new", 1.0))
    found = changes(now, before)
    assert [line.partition(":")[0].split()[-1] for line in found] == ["sdpa", "ours"]
    assert "50% faster" in found[0] and "200 ms -> 230 ms, 15% slower" in found[1]
    assert changes(now, before, limit=0.6) == []


def test_exit_status_says_whether_something_changed(write, capsys):
    now, same = write("now.json", RUN), write("same.json", RUN)
    assert main([str(now), "--against", str(same)]) == 0
    assert "0 of more than 10% changed" in capsys.readouterr().out
    slower = write("slower.json", a_run(benchmark("ours", 0.2)))
    assert main([str(now), "--against", str(slower)]) == 1
    assert "unet forward B=16 float32 ours: 200 ms -> 250 ms, 25% slower" in capsys.readouterr().out


def test_a_folder_gives_the_newest_of_this_device(write, tmp_path):
    write("stored/old.json", a_run(benchmark("ours", 1.0), datetime="2025-01-01"))
    write("stored/new.json", a_run(benchmark("ours", 2.0), datetime="2025-06-01"))
    write("stored/gpu.json", a_run(benchmark("ours", 3.0), machine=GPU, datetime="2026-06-01"))
    latest = write("stored/latest.json", a_run(benchmark("ours", 4.0), datetime="2026-07-01"))
    found = stored_run(tmp_path / "stored", RUN, [latest])
    assert cases(found)[0].seconds == 2.0
    other = a_run(machine=CPU | {"threads": 8})
    assert stored_run(tmp_path / "stored", other, []) is None


def test_a_stored_run_comes_back_without_its_samples(write, tmp_path, capsys):
    now = write("now.json", RUN)
    assert main([str(now), "--store", str(tmp_path / "kept")]) == 0
    kept = tmp_path / "kept" / "a-cpu-2-threads.json"
    assert cases(read(kept)) == cases(RUN)
    assert '"data"' not in kept.read_text()
    assert main([str(now), "--against", str(tmp_path / "kept")]) == 0


def test_report_and_plots_are_written(write, tmp_path, capsys):
    assert main([str(write("now.json", RUN)), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.md").read_text() == capsys.readouterr().out.rstrip("\n") + "\n"
    assert (tmp_path / "out" / "unet.png").read_bytes()[:4] == b"\x89PNG"


def test_runs_of_one_device_are_merged():
    merged = merge([a_run(benchmark("ours", 1.0)), a_run(benchmark("sdpa", 2.0))])
    assert [case.impl for case in cases(merged)] == ["ours", "sdpa"] and device_of(merged) == "A CPU, 2 threads"
    with pytest.raises(BadFile, match="of 2 devices"):
        merge([a_run(), a_run(machine=GPU)])


@pytest.mark.parametrize("content, message", [("{", "Expecting"), ("[]", "not the JSON of"), (None, "No such file")])
def test_bad_files(tmp_path, capsys, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and "bad.json" in said


def test_a_stored_file_of_another_device_is_refused(write, capsys):
    now, other = write("now.json", RUN), write("gpu.json", a_run(machine=GPU))
    assert main([str(now), "--against", str(other)]) == 2
    assert "must be of A CPU, 2 threads" in capsys.readouterr().err
