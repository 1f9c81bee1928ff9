"""The loop that every training shares: batches in order, log, bar, checkpoints, pictures, resume, and a safe stop."""

import math
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from encdiff import __version__
from encdiff.data import describe
from encdiff.data.dataset import Source
from encdiff.data.loader import Batches
from encdiff.distributed.launch import launched
from encdiff.distributed.processes import Processes, patience, processes
from encdiff.distributed.share import Share
from encdiff.errors import InputError, Lost, Stopped
from encdiff.files.checkpoint import load_tensors, save_tensors, step_of
from encdiff.files.temporaries import errors_of
from encdiff.terminal import Tasks, progress_bar, say
from encdiff.training.runs import CsvLog, RunFolder

T = TypeVar("T", bound="Trainable")


class Trainable(Protocol):
    """What `fit` drives: everything of a training that changes from step to step."""

    UNIT: ClassVar[str]  # what the data's samples are called
    config: Any  # a dataclass with steps, batch_size, seed, log_every, checkpoint_every, picture_every
    device: torch.device
    share: Share  # of each batch, this process's rows
    step: int
    asked: bool  # to stop: of several processes `advance` tells the others, and gives what they tell as a term "asked"

    @property
    def TERMS(self) -> tuple[str, ...]: ...  # names of what `advance` returns, "loss" first
    def begin(self, images: Tensor) -> None: ...  # whatever needs the first batch before step 0
    def prepare(self, batches: Batches) -> None: ...  # whatever is computed once for the data set, before any step
    def advance(
        self, images: Tensor, indices: Tensor
    ) -> Mapping[str, Tensor | float]: ...  # one step on what the data reads, such as images uint8 (B, S, S, 3)
    def model_config(self) -> dict: ...
    def assembled(self) -> AbstractContextManager[None]: ...  # all processes: for the first to save or show the model
    def tensors(self) -> dict[str, Tensor]: ...  # all that `load` needs
    def load(self, tensors: dict[str, Tensor], metadata: dict[str, str], source: Path) -> None: ...
    def save_model(self, folder: Path) -> None: ...
    def picture(self, images: Tensor, samples: Path) -> Path | None: ...  # the file that it wrote


def fit(
    training: T,
    dataset: Source,
    run_dir: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tensorboard: bool = False,
    on_step: Callable[[T], None] | None = None,
) -> None:
    """Run a training to its last step in a run folder; see `train` for the arguments."""
    config, writer_class, everyone = training.config, _summary_writer() if tensorboard else None, processes()
    with _held(RunFolder(run_dir, resume, overwrite, check=False), everyone) as folder:
        _check_same(training, dataset, everyone)
        with progress_bar(f"reading {training.UNIT}") as report:
            batches = everyone.together(
                lambda: Batches(dataset, config.batch_size, config.seed, None, training.device, report, training.share)
            )
        if folder.restarted:
            say(f"{folder.path}: restarted, {'goes on from its checkpoint' if folder.resume else 'begins anew'}")
        if folder.resume:
            _resume(training, dataset, folder, everyone)
        else:
            training.begin(everyone.together(lambda: batches.images(0)))
        training.prepare(batches)
        begun = training.step
        columns = ("step", *training.TERMS, "images_per_second", "seconds")
        log: CsvLog | None = None

        def begin() -> None:
            nonlocal log
            folder.begin()
            folder.write_config(_described(training, dataset))
            log = CsvLog(folder.path / "log.csv", columns, training.step)

        everyone.by_first(begin)
        shown = _Events(writer_class, folder.path / "tensorboard", training.step) if writer_class and log else None
        if begun >= config.steps:
            say(f"{folder.path}: is at its last step already")
        with shown or nullcontext() as events, Interrupt() as interrupt, Tasks() as tasks:
            _loop(training, batches, folder, _Recorder(training, log, tasks, events), interrupt, on_step)
        _save(training, folder, changed=training.step > begun)
    if training.step < config.steps:
        raise Stopped(
            f"stopped after step {training.step}; saved {folder.checkpoint}, continue with resume=True (--resume)"
        )


@contextmanager
def _held(folder: RunFolder, everyone: Processes) -> Iterator[RunFolder]:
    """The run's folder, locked by the first process; all know whether it is resumed."""
    with ExitStack() as stack:

        def take() -> bool:
            folder.check()
            return stack.enter_context(folder).resume

        folder.resume = everyone.by_first(take)
        yield folder


def share_start(model_config: dict, config: Any, modules: Iterable[torch.nn.Module], everyone: Processes) -> None:
    """Parameters and buffers of all processes become the first one's; InputError where these train something else."""
    if everyone.size > 1:  # compared first: tensors of other shapes end a process
        everyone.same(encdiff=__version__, torch=torch.__version__, **(model_config | asdict(config)))
        for module in modules:
            everyone.from_first([*module.parameters(), *module.buffers()])


def _check_same(training: Trainable, dataset: Source, everyone: Processes) -> None:
    """InputError where processes were given different data, or compute on different devices."""
    if everyone.size == 1:
        return
    found = everyone.together(lambda: describe(dataset))
    data = {"data": f"{found['name']}, {found['images']:,} images", "sha256 of its images": found["sha256"]}
    everyone.same(device=training.device.type, **data)


def _loop(training, batches, folder, recorder, interrupt, on_step) -> None:
    config, dataset, everyone = training.config, batches.dataset, processes()
    shown = np.linspace(0, len(dataset) - 1, min(8, len(dataset))).astype(np.int64)
    stops = _Stops(training, interrupt)
    while training.step < config.steps and not stops.now:
        terms = training.advance(*batches.batch(training.step))
        step = training.step
        stops.heed(terms)
        if on_step:
            on_step(training)
        if step % config.log_every == 0 or step == config.steps:
            recorder(terms)
        recorder.tell(terms)
        if step % config.picture_every == 0 or step == config.steps:  # before this step counts as done

            def picture() -> None:
                images = torch.from_numpy(dataset.read(shown)).to(training.device)
                recorder.show(training.picture(images, folder.samples))

            with training.assembled():
                everyone.by_first(picture)
        if step % config.checkpoint_every == 0:
            _save(training, folder)


class _Stops:
    """Whether to stop after a step: asked of this process or, as they tell one another in each step, of any.

    What they tell is read BEHIND steps later on a GPU, so that the host is ahead of it; all stop after the same step.
    """

    BEHIND = 2

    def __init__(self, training: Trainable, interrupt: "Interrupt"):
        self.training, self.interrupt, self.heard = training, interrupt, False
        self.several = processes().size > 1
        self.told: deque[tuple[Tensor, Any]] = deque()

    @property
    def now(self) -> bool:
        self.training.asked = self.interrupt.requested
        return self.heard if self.several else self.interrupt.requested

    def heed(self, terms: Mapping[str, Tensor | float]) -> None:
        if not self.several:
            return
        asked = torch.as_tensor(terms["asked"])
        if asked.is_cuda:
            asked, read = (
                torch.empty_like(asked, device="cpu", pin_memory=True).copy_(asked, non_blocking=True),
                (torch.cuda.Event()),
            )
            read.record()
            self.told.append((asked, read))
            if len(self.told) <= self.BEHIND:
                return
            asked, read = self.told.popleft()
            _wait(read, patience())  # in a captured graph nothing else keeps time
        self.heard = self.heard or bool(asked > 0)


def _described(training: Trainable, dataset: Source) -> dict:
    """What a run is: written at its beginning, compared when it is resumed."""
    return {
        "model": training.model_config(),
        "training": asdict(training.config),
        "data": dataset.spec or dataset.name,  # the command line opens it again by this
        "fingerprint": describe(dataset),
        "version": __version__,
    }


def _resume(training: Trainable, dataset: Source, folder: RunFolder, everyone: Processes) -> None:
    """From the checkpoint, which the first process reads, and the others get from it."""
    tensors: dict[str, Tensor] = {}
    described = _described(training, dataset)

    def read() -> tuple[dict[str, str], dict[str, tuple[torch.Size, torch.dtype]], int]:
        folder.check_same_run(described)
        found, metadata = load_tensors(folder.checkpoint)
        tensors.update(found)
        return metadata, {k: (t.shape, t.dtype) for k, t in found.items()}, step_of(metadata, folder.checkpoint)

    metadata, like, step = everyone.by_first(read)
    tensors = tensors or {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in like.items()}
    everyone.from_first(list(tensors.values()))
    training.load(tensors, metadata, folder.checkpoint)
    training.step = step


def _save(training: Trainable, folder: RunFolder, changed: bool = True) -> None:
    """Model and checkpoint, by the first process; `changed`: what shows the model as it was is removed first."""

    def save() -> None:
        if changed:
            folder.forget_shown()
        tensors = training.tensors()
        if not all(t.isfinite().all() for t in tensors.values()):
            raise diverged(training.step, f"{folder.checkpoint} is of an earlier step and whole")
        metadata = {"step": str(training.step)}
        metadata |= {k: str(v) for k, v in training.model_config().items() if k == "scaling_factor"}
        training.save_model(folder.model)
        save_tensors(folder.checkpoint, tensors, metadata)  # last: with it the step is done

    with training.assembled():
        processes().by_first(save)


def diverged(step: int, state: str) -> InputError:
    return InputError(f"training diverged by step {step}: lower the learning rate, or use float32; {state}")


def _wait(event: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            raise Lost(f"a step did not end within {seconds:g} s, perhaps since another process did not come to it")
        time.sleep(1e-4)


class _Recorder:
    """Writes the terms of a step to the log and TensorBoard, pictures to the latter; says how far the training is.

    Of several processes all look whether the loss is finite, and the first, which has the log, writes.
    """

    def __init__(self, training: Trainable, log: CsvLog | None, tasks: Tasks, events: "_Events | None"):
        self.training, self.log, self.tasks, self.events = training, log, tasks, events
        self.began, self.since = time.monotonic(), training.step
        if training.step < training.config.steps:
            tasks("training", training.step, training.config.steps)

    def __call__(self, terms: dict[str, Tensor]) -> None:
        step, seconds = self.training.step, time.monotonic() - self.began
        row = {name: float(terms.get(name, 0.0)) for name in self.training.TERMS}
        if not math.isfinite(row["loss"]):
            raise diverged(step, f"the loss is {row['loss']}; the checkpoint is of an earlier step and whole")
        if self.log is None:
            return
        row["images_per_second"] = self._speed()
        self.log.write(step=step, **row, seconds=round(self.log.seconds + seconds, 2))
        if self.events:
            self.events.row(row, step)

    def tell(self, terms: dict[str, Tensor]) -> None:
        """Say how far it is, once a second and at the end: to read the loss waits for the device."""
        step, steps = self.training.step, self.training.config.steps
        if self.tasks.due or step == steps:
            self.tasks(
                "training", step, steps, f"loss {float(terms['loss']):.4f}, {self._speed():,.0f} {self.training.UNIT}/s"
            )

    def _speed(self) -> float:
        return (self.training.step - self.since) * self.training.config.batch_size / (time.monotonic() - self.began)

    def show(self, picture: Path | None) -> None:
        if self.events and picture:
            self.events.picture(picture, self.training.step)


class _Events:
    """What TensorBoard shows of a run in its folder; what an interrupted run wrote after `step` is hidden."""

    def __init__(self, writer_class: type, folder: Path, step: int):
        self.folder = folder
        with errors_of(folder):
            self.writer = writer_class(str(folder), purge_step=step + 1)

    def __enter__(self) -> "_Events":
        return self

    def __exit__(self, *error) -> None:
        with errors_of(self.folder):
            self.writer.close()

    def row(self, row: dict[str, float], step: int) -> None:
        with errors_of(self.folder):
            for name, value in row.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

    def picture(self, path: Path, step: int) -> None:
        with Image.open(path) as image, errors_of(self.folder):
            pixels = np.asarray(image.convert("RGB"))
            self.writer.add_image(path.stem.rpartition("-")[0], pixels, step, dataformats="HWC")
            self.writer.flush()


class Interrupt:
    """Inside the block the first Ctrl-C or SIGTERM only sets `requested`; the second ends the program.

    Under torchrun, which kills what does not end in time and may ask twice, no second one counts.
    """

    requested = False

    def __enter__(self) -> "Interrupt":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere signals cannot be caught
            self.before = {s: signal.signal(s, self._request) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _request(self, signum: int, _) -> None:
        if self.requested and not launched():
            raise KeyboardInterrupt
        self.requested = True


def _summary_writer() -> type:
    """TensorBoard's writer; InputError without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError(
            "tensorboard (--tensorboard) is not installed; pip install tensorboard, or leave it out"
        ) from None
    return SummaryWriter
