import json
import signal
import sys
import time

import pytest
import torch

from bench import gpu
from bench.gpu import Phase, collect, main, plan, run_all


def python(name: str, code: str, seconds: int = 20, **env: str) -> Phase:
    return Phase(name, seconds, [sys.executable, "-c", code], env)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 3)


def test_a_failure_is_recorded_and_the_next_phase_still_runs(tmp_path, capsys):
    phases = [
        python("good", "print('all | well')"),
        python("bad", "import sys; print('why'); sys.exit(3)"),
        Phase("absent", 5, ["no-such-command"]),
        python("after", "import os; print(os.environ['MARK'])", MARK="seen"),
    ]
    outcomes = run_all(phases, tmp_path, 60)
    assert [o.result for o in outcomes[:2]] == ["ok", "exit status 3"]
    assert outcomes[2].result.startswith("cannot start: ") and outcomes[3][1::2] == ("ok", "seen")
    assert "===== bad" in (tmp_path / "log.txt").read_text() and "why" in (tmp_path / "log.txt").read_text()
    table = (tmp_path / "summary.md").read_text()
    assert table.startswith("4 phases, 2 failed") and "| good | ok | " in table and "all / well" in table


def test_a_phase_out_of_time_is_interrupted_and_may_save(tmp_path, quick):
    saves = "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
    hangs = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script that a shell runs in the background
    began = time.monotonic()
    try:
        saved, killed = run_all([python("saves", saves, 8), python("hangs", hangs, 4)], tmp_path, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (saved.result, saved.last) == ("ok", "saved")
    assert (killed.result, killed.last) == ("out of time after 4 s", "begun")
    assert time.monotonic() - began < 60


def test_phases_share_the_time(tmp_path, quick):
    outcomes = run_all([python("long", "import time; time.sleep(60)"), python("none", "")], tmp_path, 1.5)
    assert [o.result.split(" after")[0] for o in outcomes] == ["out of time", "not begun: no time left"]


def test_results_are_gathered_into_a_few_files(tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "out"
    for folder in (work / "paper", work / "profile", out):
        folder.mkdir(parents=True)
    info = {"op": "step", "phase": "step", "shape": "B=1", "dtype": "torch.float32", "impl": "ours"}
    benchmark = {"stats": {"median": 0.5, "data": [0.5]}, "extra_info": info}
    for name in ("ops", "whole"):
        (work / f"{name}.json").write_text(json.dumps({"machine_info": {"gpu": "A"}, "benchmarks": [benchmark]}))
    (work / "compiled.json").touch()  # its phase was ended before it wrote
    (work / "paper" / "log.csv").write_text("step,loss\n50,0.5\n")
    (work / "profile" / "table.txt").write_text("table")
    (work / "profile" / "trace.json").write_text("{}")
    (out / "log.txt").write_text("log")
    collect(work, out)
    assert len(json.loads((out / "benchmarks.json").read_text())["benchmarks"]) == 2
    assert (out / "training.csv").read_text() == "paper,step,loss\npaper,50,0.5\n"
    names = {"benchmarks.json", "report.md", "training.csv", "profile.txt", "trace.json.gz", "log.txt"}
    assert {path.name for path in out.iterdir()} == names
    assert "compiled.json" in capsys.readouterr().out


@pytest.mark.parametrize("cpu", [False, True], ids=["gpu", "cpu"])
def test_the_plan_names_files_that_exist_and_fits_ten_minutes_but_for_slack(tmp_path, cpu):
    phases = plan(tmp_path, cpu)
    assert len({phase.name for phase in phases}) == len(phases)
    paths = [word for phase in phases for word in phase.command if word.startswith(("bench/", "tests/"))]
    assert len(paths) > 10 and all((gpu.ROOT / path).exists() for path in paths)
    assert sum(phase.seconds for phase in phases if phase.name != "compiled") <= 12 * 60
    assert any("compute-sanitizer" in phase.command for phase in phases) is not cpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no GPU" in said and "--cpu" in said
    assert not (tmp_path / "out").exists()


def test_the_whole_script_without_a_gpu(tmp_path, capsys):
    assert main([str(tmp_path / "out"), "--cpu", "--only", "machine"]) == 0
    assert (tmp_path / "out" / "summary.md").read_text().startswith("1 phases, 0 failed; commit ")
