"""The folder of a run: one training at a time, nothing lost or left over at any moment, no foreign file touched."""

import csv
import multiprocessing
import os
import shutil
import signal
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from _tiny import TINY
from PIL import Image

from encdiff import EncDiff, InputError
from encdiff.data import open_dataset
from encdiff.errors import Stopped
from encdiff.experiments.phases import once, score_once, steps_done
from encdiff.files.checkpoint import load_tensors
from encdiff.models.autoencoder import VQAutoencoder
from encdiff.training import AutoencoderTrainConfig, TrainConfig, train, train_autoencoder
from encdiff.training.runs import CsvLog, RunFolder

pytestmark = pytest.mark.usefixtures("quick_pictures")
SMALLER = replace(TINY, multipliers=(1,), attention_levels=(0,))  # what is within a model is all the same here
CONFIG = TrainConfig(steps=3, batch_size=8, warmup=1, log_every=1, checkpoint_every=1, picture_every=1)
FILES = ["checkpoint.safetensors", "config.json", "log.csv", "model", "samples"]
PICTURES = [f"swap-{step:07d}.png" for step in (1, 2, 3)]
LEFT = [".checkpoint.safetensors.4194305.safetensors", ".tmpQCT32d", ".encdiff-4194305-1-0-00000000", ".lock"]
JUNK = [".DS_Store", "Thumbs.db", "desktop.ini"]


@pytest.fixture(scope="module")
def dataset():
    return open_dataset("procedural:2,1,1,1,1,1", TINY.image_size)  # of two images: quickly drawn


def fresh() -> EncDiff:
    torch.manual_seed(0)
    return EncDiff(SMALLER)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def state(run) -> tuple:
    """All that a run leaves, but times."""
    tensors, metadata = load_tensors(run / "checkpoint.safetensors")
    model, _ = load_tensors(run / "model" / "model.safetensors")
    with (run / "log.csv").open(newline="") as file:
        rows = [(row["step"], row["loss"]) for row in csv.DictReader(file)]
    weights = {name: tensor.numpy().tobytes() for part in (tensors, model) for name, tensor in part.items()}
    pictures = {path.name: path.read_bytes() for path in (run / "samples").iterdir()}
    return names(run), names(run / "model"), metadata, rows, weights, pictures


class Killed(BaseException):
    """Nothing catches it."""


def killed_at(monkeypatch, moment: int, work) -> bool:
    """Do the work up to the file that comes after `moment` others; whether there was one more."""
    move, moved = os.replace, []

    def replace(*paths):
        if len(moved) == moment:
            raise Killed
        moved.append(paths)
        move(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            work()
        except Killed:
            return True
    return False


def train_model(dataset, run, **options) -> None:
    train(fresh(), dataset, run, replace(CONFIG, steps=2, checkpoint_every=2), **options)


def train_first_stage(dataset, run, **options) -> None:
    torch.manual_seed(0)
    model = VQAutoencoder(width=32, multipliers=(1,), depth=1, codebook_size=64)
    every = dict(log_every=1, checkpoint_every=1, picture_every=1)
    config = AutoencoderTrainConfig(steps=2, batch_size=4, discriminator=False, **every)
    train_autoencoder(model, dataset, run, config, **options)


@pytest.mark.parametrize("work", [train_model, train_first_stage])
def test_killed_between_any_two_files_a_run_loses_nothing(work, dataset, tmp_path, monkeypatch):
    work(dataset, tmp_path / "whole")
    whole, run, moment = state(tmp_path / "whole"), tmp_path / "run", 0
    assert len(whole[-1]) == 2
    while killed_at(monkeypatch, moment, lambda: work(dataset, run, overwrite=True)):
        begun = (run / "checkpoint.safetensors").is_file()
        if begun and steps_done(run) == 2:  # what continues work takes it for done
            assert state(run) == whole, f"killed after {moment} files"
        work(dataset, run, resume=begun, overwrite=not begun)
        assert state(run) == whole, f"killed after {moment} files"
        moment += 1
    assert moment > 8


@pytest.mark.parametrize("where", ["", "samples", "model"])
def test_what_a_killed_training_left_is_cleared(dataset, tmp_path, where):
    run = tmp_path / "run"
    train(fresh(), dataset, run, replace(CONFIG, steps=1))
    for options in ({"resume": True}, {"overwrite": True}):
        for name in LEFT if where == "" else LEFT[:-1]:
            (run / where / name).write_text("half")
        train(fresh(), dataset, run, replace(CONFIG, steps=2), **options)
        assert names(run) == FILES and names(run / "samples") == PICTURES[:2]
        assert all(name[0] != "." for name in names(run / "model"))


def test_a_folder_with_nothing_of_worth_is_empty(dataset, tmp_path):
    for name in LEFT + JUNK:
        (tmp_path / name).write_text("rest")
    train(fresh(), dataset, tmp_path, replace(CONFIG, steps=1))
    assert names(tmp_path) == sorted(FILES + JUNK)
    train(fresh(), dataset, tmp_path, replace(CONFIG, steps=1), overwrite=True)
    assert names(tmp_path) == sorted(FILES + JUNK)
    (tmp_path / ".thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="also holds .thesis.tex"):
        train(fresh(), dataset, tmp_path, CONFIG, overwrite=True)
    assert (tmp_path / ".thesis.tex").read_text() == "precious"


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}, {}])
def test_a_second_training_in_the_folder_is_refused(dataset, tmp_path, options):
    run, refused = tmp_path / "run", []

    def meanwhile(training) -> None:
        with pytest.raises(InputError) as error:
            train(fresh(), dataset, run, CONFIG, **options)
        refused.append(str(error.value))

    train(fresh(), dataset, run, CONFIG, on_step=meanwhile)
    said = f"{run}: a training writes to it now, process {os.getpid()}; stop that one"
    assert len(refused) == 3 and "\n" not in refused[-1]
    assert refused[-1].startswith(said)
    train(fresh(), dataset, tmp_path / "alone", CONFIG)
    assert state(run) == state(tmp_path / "alone")


def test_two_begin_in_a_new_folder_and_one_is_refused(dataset, tmp_path):
    """Both find none; the lock decides."""
    folders = [RunFolder(tmp_path / "run") for _ in range(2)]
    with folders[0] as first:
        first.begin()
        with pytest.raises(InputError, match="a training writes to it now"), folders[1] as second:
            second.begin()
        assert (tmp_path / "run" / ".lock").is_file()
        (tmp_path / "run" / "log.csv").write_text("rows")
    with pytest.raises(InputError, match="holds something already"), RunFolder(tmp_path / "other") as third:
        shutil.copytree(tmp_path / "run", tmp_path / "other")  # another training has come and gone
        third.begin()
    assert names(tmp_path / "run") == names(tmp_path / "other") == ["log.csv", "samples"]


def test_the_lock_of_a_killed_process_is_lifted(tmp_path):
    def hold() -> None:
        with RunFolder(tmp_path / "run") as folder:
            folder.begin()
            begun.set()
            time.sleep(600)

    forks = multiprocessing.get_context("fork")
    begun, process = forks.Event(), forks.Process(target=hold)
    process.start()
    assert begun.wait(60)
    with pytest.raises(InputError, match=f"run: a training writes to it now, process {process.pid};"):
        RunFolder(tmp_path / "run", overwrite=True)
    process.kill()
    process.join()
    with RunFolder(tmp_path / "run", overwrite=True) as folder:
        folder.begin()
    assert names(tmp_path / "run") == ["samples"]


def test_one_of_many_threads_holds_the_lock(tmp_path):
    """However often it is released, and its file removed, between one's opening and locking it."""
    inside, most, failures = [], [], []
    (tmp_path / "run").mkdir()

    def enter() -> None:
        for _ in range(200):
            try:
                with RunFolder(tmp_path / "run"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
            except InputError as error:
                failures.append(str(error))

    threads = [threading.Thread(target=enter) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert set(most) == {1} and all("a training writes to it now" in failure for failure in failures)


def test_where_nothing_can_be_locked_it_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunFolder(tmp_path / "run") as folder:
        folder.begin()
    assert "cannot be locked ([Errno 37] No locks available)" in caplog.text
    assert names(tmp_path / "run") == ["samples"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file that is always full")
def test_a_row_that_cannot_be_written_names_the_log(tmp_path):
    log = CsvLog(tmp_path / "log.csv", ("step", "seconds"))
    log.path = Path("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        log.write(step=1, seconds=1.0)


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(12):
        Image.new("RGB", (16, 16), (20 * i, 255 - 20 * i, 7)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_data_under_another_name_is_the_same_data(photos, tmp_path):
    run = tmp_path / "run"
    train(fresh(), open_dataset(photos, 16), run, replace(CONFIG, steps=1))
    moved = photos.rename(tmp_path / "pictures")
    train(fresh(), open_dataset(moved, 16), run, replace(CONFIG, steps=2), resume=True)
    assert load_tensors(run / "checkpoint.safetensors")[1]["step"] == "2"
    once(run, asdict(SMALLER), replace(CONFIG, steps=2), open_dataset(moved, 16), None)  # is done
    Image.new("RGB", (16, 16)).save(moved / "0.png")
    with pytest.raises(InputError, match="was begun with sha256"):
        train(fresh(), open_dataset(moved, 16), run, CONFIG, resume=True)


def test_scores_of_data_under_another_name_are_kept(tmp_path, monkeypatch):
    room = open_dataset("procedural:2,2,2,2,2,2", TINY.image_size)
    train(fresh(), room, tmp_path / "run", replace(CONFIG, steps=1))
    first = score_once(tmp_path / "run", room, protocol="quick")
    room.name = "room.h5"
    monkeypatch.setattr("encdiff.experiments.phases.evaluate_model", None)
    assert score_once(tmp_path / "run", room, protocol="quick") == first


def events(run) -> tuple[dict, dict]:
    """Steps of the scalars and of the pictures that TensorBoard shows, by tag."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = reader.EventAccumulator(str(run / "tensorboard"), {"scalars": 0, "images": 0})
    shown.Reload()
    tags = shown.Tags()
    scalars = {tag: [event.step for event in shown.Scalars(tag)] for tag in tags["scalars"]}
    return scalars, {tag: [event.step for event in shown.Images(tag)] for tag in tags["images"]}


def stop_after(step: int):
    return lambda training: training.step == step and signal.raise_signal(signal.SIGINT)


def test_tensorboard_shows_rows_and_pictures(dataset, tmp_path):
    pytest.importorskip("tensorboard")
    run, expected = tmp_path / "run", {"swap": [1, 2, 3]}
    for options in ({}, {"overwrite": True}):
        train(fresh(), dataset, run, CONFIG, tensorboard=True, **options)
        scalars, pictures = events(run)
        assert pictures == expected and scalars["loss"] == scalars["learning_rate"] == [1, 2, 3]
        assert names(run) == sorted([*FILES, "tensorboard"]) and len(names(run / "tensorboard")) == 1
    with pytest.raises(Stopped):
        train(fresh(), dataset, run, CONFIG, tensorboard=True, overwrite=True, on_step=stop_after(2))
    train(fresh(), dataset, run, CONFIG, tensorboard=True, resume=True)
    scalars, pictures = events(run)
    assert pictures == expected and scalars["loss"] == [1, 2, 3]


def test_what_an_interrupted_run_wrote_after_its_checkpoint_is_shown_once(dataset, tmp_path):
    pytest.importorskip("tensorboard")
    run, config = tmp_path / "run", replace(CONFIG, steps=4, checkpoint_every=2)

    def kill(training) -> None:
        if training.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(fresh(), dataset, run, config, tensorboard=True, on_step=kill)
    train(fresh(), dataset, run, config, tensorboard=True, resume=True)
    assert events(run)[0]["loss"] == [1, 2, 3, 4]


def test_a_restart_goes_on_and_nothing_else_does(tmp_path, monkeypatch):
    """torchrun restarts a process in the folder that the one before began; no other launch, no second training."""

    def began(launch) -> RunFolder:
        monkeypatch.setattr("encdiff.training.runs.launch_id", lambda: launch)
        folder = RunFolder(tmp_path / "run")
        with folder:
            folder.begin()
        return folder

    began(("launch", "process 1"))
    for other in (None, ("launch", "process 1"), ("another", "process 2")):
        with pytest.raises(InputError, match="holds something already"):
            began(other)
    folder = began(("launch", "process 2"))  # no checkpoint yet: anew
    assert folder.overwrite and not folder.resume
    folder.checkpoint.touch()
    folder = began(("launch", "process 3"))
    assert folder.resume and not folder.overwrite and folder.checkpoint.is_file()
