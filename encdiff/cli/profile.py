"""The command `encdiff profile`: where the time of a training step or of sampling goes."""

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from encdiff.cli.options import Device
from encdiff.cli.support import choose_device
from encdiff.errors import InputError
from encdiff.files.temporaries import atomic_path
from encdiff.terminal import say

# Modules that load torch are imported inside the command, so that --help answers at once.


class Phase(StrEnum):
    train = "train"
    sample = "sample"


def profile(
    run: Annotated[
        Path | None, typer.Option(help="A run whose model to take. Default: none.", show_default=False)
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Without a run. Default: quickstart.", show_default=False)] = None,
    phase: Annotated[Phase, typer.Option(help="A training step, or sampling images from codes.")] = Phase.train,
    batch_size: Annotated[int | None, typer.Option(help="Default: 64 for quickstart, else 128.", min=1)] = None,
    precision: Annotated[str, typer.Option(help="Of a training step: float32, tf32 or bf16.")] = "float32",
    engine: Annotated[str, typer.Option(help="Of a training step; only eager shows its parts.")] = "eager",
    sampler: Annotated[str, typer.Option(help="As for swap.")] = "dpm-solver++",
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    calls: Annotated[int, typer.Option(help="Training steps, or batches of samples, to record.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="A folder for trace.json and table.txt.")] = Path("runs/profile"),
    nvtx: Annotated[bool, typer.Option("--nvtx", help="Under nsys or ncu: ranges, no trace of its own.")] = False,
    device: Device = "auto",
) -> None:
    """Time by module and operator. On random images: a table, and a trace for chrome://tracing or ui.perfetto.dev.

    With --nvtx it writes nothing and marks modules, phases and the calls to record for NVIDIA's tools instead: see
    docs/profiling.md.
    """
    import torch
    from torch.autograd.profiler import emit_nvtx

    from encdiff.profiling import capture, ranges, trace

    if run is not None and preset is not None:
        raise InputError("--run and --preset cannot both be given: a run has its own configuration")
    where = choose_device(device)
    if nvtx and not where.startswith("cuda"):
        raise InputError(f"--nvtx marks ranges for NVIDIA's tools, needs a GPU; the device is {where}")
    torch.manual_seed(0)
    model = _model(run, preset or "quickstart").to(where)
    batch_size = batch_size or (128 if model.config.first_stage == "vq" else 64)
    if phase is Phase.train:
        model, work = _training_step(model, batch_size, precision=precision, engine=engine)
    else:
        scalars = torch.randn(batch_size, *model.config.code_shape, device=where)
        work = partial(model.sample, scalars, sampler=sampler, steps=steps)
    if nvtx:
        work()
        with ranges(model), emit_nvtx(), capture():
            for _ in range(calls):
                work()
        return
    out.mkdir(parents=True, exist_ok=True)
    if engine != "eager":
        for _ in range(4):  # compiled, or captured after three calls: what is shown is the steady state
            work()
    table = trace(model, work, calls, out / "trace.json").table()
    with atomic_path(out / "table.txt") as temporary:
        temporary.write_text(table + "\n", "utf-8")
    say(table)
    say(f"\ntrace: {out / 'trace.json'}\ntable: {out / 'table.txt'}")


def _model(run: Path | None, preset: str):
    from encdiff.models import EncDiff

    if run is None:
        return EncDiff.from_preset(preset)
    return EncDiff.from_pretrained(run / "model" if (run / "model").is_dir() else run)


def _training_step(model, batch_size: int, **options):
    """What computes, and one step on random images as `encdiff train` takes it, the first stage's encoding included."""
    import torch

    from encdiff.training import TrainConfig, Training

    training = Training(model, TrainConfig(batch_size=batch_size, **options))
    size, device = model.config.image_size, training.device
    images = torch.randint(256, (batch_size, size, size, 3), dtype=torch.uint8, device=device)
    indices = torch.arange(batch_size, device=device)
    return training.computing, lambda: training.advance(images, indices)
