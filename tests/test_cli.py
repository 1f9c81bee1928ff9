import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from _tiny import SET_SMALLER, TINY
from PIL import Image

from encdiff import EncDiff, __version__
from encdiff.cli.support import metric_names, results, told_of_precision
from encdiff.data import open_dataset
from encdiff.errors import InputError
from encdiff.metrics import METRICS
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.training import TrainConfig, train

DATA = "procedural:2,2,2,2,2,2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a few steps."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(EncDiff(TINY), open_dataset(DATA, TINY.image_size), folder, TrainConfig(steps=2, batch_size=8, warmup=1))
    return folder


def test_help_names_every_command(encdiff):
    code, text = encdiff("--help")
    assert code == 0
    for command in (
        "train",
        "train-autoencoder",
        "evaluate",
        "rank",
        "swap",
        "traverse",
        "interpolate",
        "direction",
        "attend",
        "demo",
        "data",
        "reproduce",
        "ablate",
    ):
        assert command in text
        assert encdiff(command, "--help")[0] == 0


def test_help_does_not_load_torch():
    code = """
import sys
from encdiff.cli import app as cli
sys.argv = ["encdiff", "--help"]
try:
    cli.main()
except SystemExit:
    print("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.endswith("False\n")


def test_version(encdiff):
    assert encdiff("--version") == (0, __version__)


def test_evaluate_swap_traverse_attend(encdiff, run):
    assert encdiff("evaluate", run, "--protocol", "quick", "--metrics", "factor_vae,dci,mig")[0] == 0
    results = json.loads((run / "metrics.json").read_text())
    assert results.keys() == {"trained", "untrained"}
    assert results["trained"]["protocol"]["name"] == "quick" and results["trained"]["data"]["images"] == 64
    for command, options in (
        ("swap", ["--pairs", 2]),
        ("traverse", ["--index", 3, "--values", 3]),
        ("attend", ["--images", 2]),
    ):
        code, text = encdiff(command, run, "--steps", 2, *options)
        assert code == 0 and f"{command}.png" in text
        with Image.open(run / "pictures" / f"{command}.png") as picture:
            assert min(picture.size) > 50


def test_swaps_are_judged_and_shown_beside_the_truth(encdiff, run, texts):
    code, text = encdiff("evaluate", run, "--protocol", "quick", "--metrics", "dci,counterfactual", "--pairs", 2)
    assert code == 0 and "swaps exact" in text and "swaps of 2 pairs, read by the nearest true image" in text
    found = json.loads((run / "metrics.json").read_text())["trained"]["counterfactual"]
    assert found["pairs"] == 2 and found["factors"].keys() >= {"floor hue", "shape"}
    assert encdiff("swap", run, "--steps", 1, "--pairs", 1)[0] == 0 and "true" in texts
    assert encdiff("traverse", run, "--steps", 1)[0] == 0 and "Traversing factors" in texts
    del texts[:]
    assert encdiff("traverse", run, "--steps", 1, "--no-by-factor")[0] == 0 and "Traversing concepts" in texts
    assert encdiff("swap", run, "--steps", 1, "--pairs", 1, "--concepts", "0,2")[0] == 0 and "chosen" in texts
    code, text = encdiff("swap", run, "--guidance", 2)
    assert code == 2 and text.startswith("error: guidance is 2, must be 1: the model was trained with token_dropout 0")
    code, text = encdiff("evaluate", run, "--pairs", 5)
    assert (code, text) == (2, "error: --pairs 5: needs counterfactual among --metrics")


def test_factors_of_other_data_leave_single_scalars(encdiff, run, tmp_path, texts):
    scores = {"disentanglement": 1.0, "completeness": 1.0, "informativeness_test": 1.0, "importance": [[1, 0]] * 3}
    about = {"protocol": {"name": "paper", "seed": 0}, "data": {"name": "a", "factor_names": ["size", "colour"]}}
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").write_text(json.dumps({"trained": {"dci": scores} | about}))
    assert encdiff("traverse", tmp_path / "run", "--steps", 1)[0] == 0 and "Traversing concepts" in texts


def test_codes_alone_cannot_be_drawn(encdiff, tmp_path):
    np.savez(tmp_path / "codes.npz", codes=np.zeros((9, 2)), factors=np.zeros((9, 2), int))
    code, text = encdiff("evaluate", tmp_path / "codes.npz", "--metrics", "counterfactual")
    assert code == 2 and "--metrics counterfactual: is of what a model draws; an .npz holds codes alone" in text


def test_flatness_of_a_grid_alone(encdiff, run, tmp_path):
    given = ["--protocol", "quick", "--no-baseline", "--out", tmp_path / "m.json"]
    code, text = encdiff("evaluate", run, "--metrics", "flatness,mcc,unsupervised", *given)
    scores = json.loads((tmp_path / "m.json").read_text())["trained"]
    assert code == 0 and 0 < scores["flatness"]["flatness"] <= 1 and 0 < scores["mcc"]["mcc"] <= 1
    assert "straightness" in text and "MCC" in text and "Wasserstein" in text
    factors = np.random.default_rng(0).integers(0, 3, (40, 4))
    np.savez(tmp_path / "codes.npz", codes=factors * 1.0, factors=factors)
    code, text = encdiff("evaluate", tmp_path / "codes.npz", "--metrics", "mig,flatness")
    assert code == 2 and "combinations of values; flatness needs all of them, a complete grid" in text


def test_all_metrics_are_those_of_any_codes():
    every = metric_names("all")
    assert set(METRICS) - set(every) == {"tad", "dci_quick", "flatness"} and {"mcc", "unsupervised"} < set(every)
    assert metric_names("mig, all,flatness") == ["mig", *(name for name in every if name != "mig"), "flatness"]
    with pytest.raises(InputError, match="'al' is unknown, must be among factor_vae, .*, or all"):
        metric_names("all,al")


def test_a_direction_overwrites_no_weights(encdiff, run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    code, text = encdiff(
        "direction", tmp_path / "model", "--data", DATA, "--factor", "scale", "--out", tmp_path / "model" / "model.png"
    )
    assert code == 2 and "model.safetensors: is no direction and would be overwritten" in text
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_model_folder_serves_too(encdiff, run, tmp_path):
    assert (
        encdiff("swap", run / "model", "--data", DATA, "--steps", 1, "--pairs", 1, "--out", tmp_path / "x" / "s.png")[0]
        == 0
    )
    assert (tmp_path / "x" / "s.png").is_file()
    code, text = encdiff("swap", run / "model")
    assert code == 2 and "--data is missing" in text


def test_render_writes_the_schema_and_refuses_to_replace(encdiff, tmp_path):
    path = tmp_path / "room.h5"
    code, text = encdiff("data", "render", path, "--image-size", 16, "--grid", "2,1,1,2,2,1")
    assert code == 0 and "8 images" in text
    assert open_dataset(path).factor_sizes == (2, 1, 1, 2, 2, 1)
    assert encdiff("data", "render", path)[0] == 2
    assert encdiff("data", "render", path, "--grid", "1,1,1,1,1,1", "--overwrite")[0] == 0
    assert len(open_dataset(path)) == 1


def test_convert_reduces_and_rechunks(encdiff, tmp_path):
    encdiff("data", "render", tmp_path / "a.h5", "--image-size", 16, "--grid", "2,1,1,2,2,1")
    assert encdiff("data", "convert", tmp_path / "a.h5", tmp_path / "b.h5", "--image-size", 8)[0] == 0
    before, after = open_dataset(tmp_path / "a.h5", 8), open_dataset(tmp_path / "b.h5")
    assert (before.images(range(8)) == after.images(range(8))).all() and after.factor_sizes == before.factor_sizes
    assert encdiff("data", "convert", tmp_path / "a.h5", tmp_path / "a.h5")[0] == 2


def test_train_and_resume(encdiff, tmp_path):
    options = ["--run", tmp_path / "run", "--data", "procedural:2,2,1,1,1,1", "--batch-size", 4]
    assert encdiff("train", *options, "--steps", 2)[0] == 0
    code, text = encdiff("train", *options)
    assert code == 2 and "holds something already" in text
    code, text = encdiff("train", "--run", tmp_path / "run", "--resume")
    assert code == 0 and "is at its last step already" in text and "encdiff evaluate" in text and "nan" not in text
    code, text = encdiff("train", "--run", tmp_path / "run", "--resume", "--batch-size", 8)
    assert code == 2 and "was begun with batch_size 4, cannot be resumed with 8" in text
    code, text = encdiff("train", "--run", tmp_path / "run", "--resume", "--preset", "quickstart")
    assert code == 2 and "--preset, --objective, --first-stage and --set cannot be given with --resume" in text
    (tmp_path / "run" / "config.json").write_text('{"model": {}, "training": {"wings": 2}, "data": "x"}')
    code, text = encdiff("train", "--run", tmp_path / "run", "--resume")
    assert code == 2 and "config.json: unknown entries wings" in text


@pytest.mark.parametrize(
    "args, message",
    [
        (["train", "--run", "r"], "--data is missing"),
        (["train", "--run", "r", "--data", DATA, "--preset", "best"], "preset 'best' is unknown, must be one of"),
        (
            ["train", "--run", "r", "--data", DATA, "--preset", "shapes3d"],
            "first_stage (--first-stage) is None: this preset needs one",
        ),
        (["train", "--run", "r", "--data", "nowhere.h5"], "nowhere.h5"),
        (["train", "--run", "r", "--data", DATA, "--batch-size", "0"], "--batch-size"),
        (
            ["train", "--run", "r", "--data", DATA, "--learning-rate", "-1"],
            "learning_rate is -1.0, must be a number above 0",
        ),
        (["train", "--run", "r", "--resume"], "must be the folder of a training run"),
        (["evaluate", "r"], "r: no such folder"),
        (["swap", "{run}", "--source", "1"], "must be given together"),
        (["swap", "{run}", "--source", "1", "--target", "64"], "64"),
        (["swap", "{run}", "--concepts", "7"], "concept is 7, must be an integer in 0..2"),
        (["swap", "{run}", "--concepts", "x"], "--concepts 'x' must be numbers such as 0,3"),
        (
            ["train", "--run", "r", "--data", DATA, "--first-stage", "x"],
            "first_stage (--first-stage) is x: this preset takes none",
        ),
        (["evaluate", "{run}", "--out", "/proc/none/m.json"], "/proc/none"),
        *(
            ([command, "{run}", "--out", "a.pdf"], "a.pdf: must end in .png: it becomes a PNG picture")
            for command in ("swap", "traverse", "interpolate", "attend", "sample")
        ),
        (["traverse", "{run}", "--index", "64"], "64"),
        (["swap", "{run}", "--device", "cuda:7"], "--device cuda:7: no GPU"),
        (["swap", "{run}", "--device", "gpu"], "--device 'gpu' must be auto, cpu, cuda"),
        (["evaluate", "{run}", "--protocol", "best"], "best"),
        (["evaluate", "{run}", "--metrics", "luck"], "--metrics: 'luck' is unknown"),
        (["evaluate", "none.npz"], "none.npz"),
        (["evaluate", "none.NPZ"], "No such file or directory: 'none.NPZ'"),
        (["evaluate", "none.npz", "--protocol", "paper"], "none.npz: codes have no --data, and their --protocol is"),
        (["data", "render", "x.png"], "x.png: must end in .h5"),
        (["data", "render", "x.h5", "--grid", "a,b"], "procedural:a,b"),
        (["data", "render", "no/such/folder/x.h5"], "x.h5"),
        (["demonstrate"], "demonstrate"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(encdiff, run, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, text = encdiff(*(a.replace("{run}", str(run)) for a in args))
    assert code == 2 and message in text and "Traceback" not in text
    assert not any(tmp_path.iterdir())


def test_errors_of_the_disk_are_one_line(encdiff, run, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "pictures/swap.png")

    monkeypatch.setattr("encdiff.pictures.save_png", full)
    code, text = encdiff("swap", run, "--steps", 1, "--pairs", 1)
    assert code == 2 and "No space left on device" in text and "Traceback" not in text


def test_a_bug_shows_its_traceback(encdiff, run, monkeypatch):
    monkeypatch.setattr("encdiff.pictures.save_png", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encdiff("swap", run, "--steps", 1, "--pairs", 1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_0(tmp_path, signum):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "encdiff", "train", "--run", str(folder), "--data", DATA, "--batch-size", "2"]
    command += SET_SMALLER
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 60
    log = folder / "log.csv"
    while not (log.is_file() and len(log.read_text().splitlines()) > 1):  # the first 50 steps are done
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped after step" in " ".join(out.split()) and "--resume" in out
    assert (folder / "checkpoint.safetensors").is_file()
    with log.open(newline="") as file:
        assert all(row["loss"] for row in csv.DictReader(file))


def test_scores_of_something_else_are_named(encdiff, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for content in (
        "{",
        "[]",
        "{}",
        json.dumps({"trained": {"dci": {"importance": [[1]]}, "data": {"factor_names": ["a"]}}}),
    ):
        (copy / "metrics.json").write_text(content)
        code, text = encdiff("swap", copy, "--steps", 1)
        assert code == 2 and "metrics.json: " in text and "evaluate again" in text


def test_a_first_stage_of_another_configuration_is_named(encdiff, tmp_path):
    VQAutoencoder(32, (1, 2), 1, codebook_size=8).save_pretrained(tmp_path / "vq")
    options = ["--run", tmp_path / "run", "--data", DATA, "--preset", "shapes3d", "--first-stage", tmp_path / "vq"]
    code, text = encdiff("train", *options)
    assert code == 2 and "vq: does not fit this configuration" in text
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_what_shows_it_until_another_model_is_saved(encdiff, run, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shown = ["metrics.json", "importance.png", "pictures/swap.png"]
    (copy / "pictures").mkdir(exist_ok=True)
    for name in shown:
        (copy / name).write_text("kept")
    assert encdiff("train", "--run", copy, "--resume")[0] == 0
    with monkeypatch.context() as patch:  # stopped before its first step
        patch.setattr("encdiff.training.loop._loop", lambda *_: None)
        assert encdiff("train", "--run", copy, "--resume", "--steps", 3)[0] == 0
    assert [(copy / name).read_text() for name in shown] == ["kept"] * 3
    assert encdiff("train", "--run", copy, "--resume", "--steps", 3)[0] == 0
    assert not any((copy / name).exists() for name in shown)  # of the model before


def test_every_file_of_scores_has_a_plot_of_its_own(encdiff, tmp_path):
    codes = np.random.default_rng(0).integers(0, 3, (200, 2))
    np.savez(tmp_path / "codes.npz", codes=codes.astype(float), factors=codes)
    outs = ["metrics.json", "a.json", "a-metrics.json", "b.json", "codes.json"]
    for out in (None, *outs):
        options = ["--out", tmp_path / out] if out else []
        assert encdiff("evaluate", tmp_path / "codes.npz", "--metrics", "dci", *options)[0] == 0
    assert len(list(tmp_path.glob("*importance.png"))) == 1 + len(outs)
    assert (tmp_path / "importance.png").is_file()


@pytest.mark.parametrize("precision, device, told", [
    ("float32", "cuda:1", True), ("tf32", "cuda", True), ("bf16", "cuda", False), ("float32", "cpu", False),
])  # fmt: skip
def test_a_training_in_float32_on_a_gpu_is_told_what_is_faster(precision, device, told, capsys):
    assert told_of_precision(device, precision) == device
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert ("--precision bf16 is three times as fast" in text and text.count("\n") == 1) if told else text == ""


def test_what_is_made_of_a_packaged_model_is_not_put_into_a_run_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/room64").mkdir(parents=True)
    assert results(Path("room64")) == Path("runs/packaged/room64")
    assert results(Path("runs/room64")) == Path("runs/room64")
    (tmp_path / "room64").mkdir()  # a folder of that name comes first
    assert results(Path("room64")) == Path("room64")
