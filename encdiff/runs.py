"""A training run on disk: its folder, its log, and the optimiser's state as named tensors."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encdiff.checkpoint import atomic_path
from encdiff.errors import InputError


class RunFolder:
    """A run's folder: `config.json`, `log.csv`, `checkpoint.safetensors`, `samples/`, `model/`, and what shows it.

    A folder that already holds something is refused, unless `resume` continues its checkpoint or `overwrite` replaces
    the run in it. Nothing is written before `begin`.
    """

    SHOWN = ("metrics.json", "importance.png", "pictures")  # of one state of the model
    OWN = ("config.json", "log.csv", "checkpoint.safetensors", "samples", "model", "tensorboard", *SHOWN)

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False):
        self.path = Path(path)
        if resume and overwrite:
            raise InputError("resume and overwrite cannot both be given")
        if resume and not self.checkpoint.is_file():
            raise InputError(f"{self.checkpoint}: no checkpoint to resume; leave out --resume to begin a run")
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file, must be a folder")
        held = sorted(p.name for p in self.path.iterdir()) if self.path.is_dir() else []
        if held and not resume and not overwrite:
            raise InputError(f"{self.path}: holds something already; continue it with --resume or use --overwrite")
        foreign = [name for name in held if name not in self.OWN]
        if foreign and overwrite:
            raise InputError(f"{self.path}: will not overwrite a folder that also holds {foreign[0]}")
        self.resume = resume

    def begin(self, finished: bool = False) -> None:
        """Make the folder, or clear it of the run before; to be called once nothing can be refused any more.

        Of a resumed run goes what shows the model, which changes; not so if the run is `finished`.
        """
        for name in self.OWN if not self.resume else () if finished else self.SHOWN:
            path = self.path / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.samples.mkdir(parents=True, exist_ok=True)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.safetensors"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def write_config(self, values: dict[str, Any]) -> None:
        with atomic_path(self.path / "config.json") as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n")

    def check_same_run(self, described: dict[str, Any]) -> None:
        """A resumed run may be logged otherwise, or made longer; anything else would make it another run."""
        now, before = json.loads(json.dumps(described)), read_config(self.path)
        free = {"log_every", "checkpoint_every", "picture_every", "scaling_factor", "engine", "checkpoint_activations"}
        if not now["training"].get("decay"):  # else the number of steps shapes the learning rate
            free.add("steps")
        for part in ("model", "training", "fingerprint"):
            for name, value in now[part].items():
                was = before.get(part, {}).get(name, value)  # a field that is younger than the run is as it was
                if name not in free and was != value:
                    why = ": the learning rate depends on it; use another folder" if name == "steps" else ""
                    said = f"{self.path}: was begun with {name} {was!r}, cannot be resumed with {value!r}{why}"
                    raise InputError(said)


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """The `config.json` of a run folder: model, training, data, its fingerprint, version."""
    path = Path(run_dir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; {run_dir} must be the folder of a training run") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from None
    parts = {"model": dict, "training": dict, "data": str}
    if not isinstance(config, dict) or not all(isinstance(config.get(k), t) for k, t in parts.items()):
        raise InputError(f"{path}: not the configuration of a training run")
    return config


class CsvLog:
    """Rows of numbers by column, "step" and "seconds" among them; each row is on disk when `write` returns."""

    def __init__(self, path: Path, columns: tuple[str, ...], step: int = 0):
        """Keep the rows up to `step`, and drop those that an interrupted run left after it."""
        kept = _rows(path, columns, step) if step and path.is_file() else []
        with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(kept)
        self.path, self.columns = path, columns
        self.seconds = float(kept[-1]["seconds"]) if kept else 0.0  # spent before this log began

    def write(self, **row: float) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)


def _rows(path: Path, columns: tuple[str, ...], step: int) -> list[dict[str, str]]:
    kept = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                [float(row[column]) for column in columns]
            except (KeyError, TypeError, ValueError):  # a row that was torn in the writing ends the log
                break
            if int(row["step"]) <= step:
                kept.append({column: row[column] for column in columns})
    return kept


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str = "optimizer") -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `{prefix}.{parameter}.{key}`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{key}": torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items()}


def optimizer_state(
    parameters: list[Tensor], tensors: dict[str, Tensor], source: str | Path, prefix: str = "optimizer"
) -> dict[int, dict[str, Tensor]]:
    """What `optimizer_tensors` took from Adam, by the parameter's index, moments with the parameter's strides.

    Raises InputError, naming `source`, unless there are a step and both moments for some of the parameters, and they
    fit: a fused optimiser runs over memory and would read beyond a smaller one.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix + "."):
            index, _, key = name.removeprefix(prefix + ".").partition(".")
            like = parameters[int(index)] if index.isdigit() and int(index) < len(parameters) else None
            if like is None or tensor.shape != (() if key == "step" else like.shape):
                raise InputError(f"{source}: {name} {tuple(tensor.shape)} fits no parameter of this configuration")
            if key != "step":  # with the strides of its parameter
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor
    if not state or any(entry.keys() != {"step", "exp_avg", "exp_avg_sq"} for entry in state.values()):
        raise InputError(f"{source}: the state of the optimiser {prefix!r} is missing or incomplete")
    return state


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str | Path, prefix: str = "optimizer"
) -> None:
    """Put back what `optimizer_tensors` took from Adam; the hyper-parameters stay those of `optimizer`.

    Raises InputError as `optimizer_state`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = optimizer_state(parameters, tensors, source, prefix)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def step_generator(seed: int, step: int) -> torch.Generator:
    """Random numbers from seed and step alone: a resumed run repeats them."""
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9) % 2**63
    return torch.Generator().manual_seed(mixed)
