"""Methods side by side: trained at equal cost, scored alike, several seeds, one table."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from encdiff import __version__
from encdiff.baselines import load_concepts
from encdiff.data import Dataset, describe
from encdiff.errors import InputError
from encdiff.evaluation import evaluate, write_metrics
from encdiff.evaluation.encode import untrained
from encdiff.evaluation.protocol import settings_of
from encdiff.evaluation.scoring import stages
from encdiff.evaluation.tables import score_fields
from encdiff.experiments.compared import read_row, read_rows, write_tables
from encdiff.experiments.methods import METHODS, REFERENCE, UNTRAINED, Advance, Method, method
from encdiff.experiments.phases import continuable
from encdiff.files.reading import read_json
from encdiff.models import ConceptModel
from encdiff.terminal import say
from encdiff.training.runs import locked

EQUAL = ("seconds", "samples")
CODES, DRAWN = ("factor_vae", "dci", "mig", "infomec", "mcc"), ("counterfactual",)
ROUNDS, TIMED = 5, 3  # of timing, and steps of each method in one
NEAR = 0.1  # methods whose steps cost the same within this take the same number of steps


class Work(NamedTuple):
    """One training of the comparison."""

    method: Method
    steps: int
    seed: int
    equal: tuple[str, ...]  # what it is equal to the reference in

    def name(self, data: str) -> str:
        return f"{data}-{self.method.name}-{self.steps}-seed{self.seed}"


def compare(
    datasets: Sequence[Dataset],
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    steps: int = 1000,
    batch_size: int = 64,
    equal: Sequence[str] = EQUAL,
    protocols: Sequence[str] = ("paper", "heldout"),
    pairs: int = 64,
    device: str = "cpu",
    say: Callable[[str], None] = say,
) -> list[dict]:
    """Train and score methods on data sets, seeds 0, 1, ...: a run each in `out/runs`, a row each in `out/rows`.

    Args:
        datasets: complete grids of factors, of 32x32 images.
        methods: names in METHODS; None: all.
        steps: of the reference, EncDiff. At equal samples all others take as many; at equal seconds as many as take as
            long, by the time of a step that is measured first, all methods side by side, and kept in `out/costs.json`:
            the processor's on a CPU, so that other work beside it changes little. A method whose step costs the same
            within a tenth takes as many.
        protocols: of the scores of codes; those of what is drawn are by the first.
        pairs: swaps of each factor that are judged.
        say: told what begins.

    Called again, rows that are there are not made again, even without their runs, and an interrupted run goes on; a
    further protocol is scored on the model of the run, which is trained anew where that is gone. The tables and figures
    of `out` are of all its rows and written anew after each. Returns the rows.

    Raises:
        InputError: an unknown method or protocol, data that is no complete grid, or of another size, and a folder of
            other settings or other data of the same name.
        Stopped: after Ctrl-C or SIGTERM, with everything kept.
    """
    chosen = [method(name) for name in methods or METHODS]
    _check(datasets, equal, protocols, seeds, chosen)
    settings = {"steps": steps, "batch_size": batch_size, "pairs": pairs, "device": torch.device(device).type}
    _check_settings(out / "settings.json", settings | {"version": __version__})
    with continuable(), locked(out):
        costs = _costs(out / "costs.json", chosen, datasets[0], batch_size, device, say)
        work = [(w, data) for w in _planned(chosen, costs, steps, seeds, equal) for data in datasets]
        (out / "rows").mkdir(parents=True, exist_ok=True)
        for i, (todo, data) in enumerate(work):
            name = todo.name(_word(data))
            path, run = out / "rows" / f"{name}.json", out / "runs" / name
            row = _begun(path, todo, data, costs, settings)
            missing = [protocol for protocol in protocols if protocol not in row["scores"]]
            if missing:
                say(f"{i + 1}/{len(work)} {name}, at equal {' and '.join(todo.equal)}")
                _score(row, _trained(todo, data, run, batch_size, device), data, run, missing, pairs)
            if missing or not set(todo.equal) <= set(row["equal"]):
                row["equal"] = [cost for cost in EQUAL if cost in {*todo.equal, *row["equal"]}]
                write_metrics(path, row)
                write_tables(out)
    write_tables(out)
    return read_rows(out)


def _check(
    datasets: Sequence[Dataset], equal: Sequence[str], protocols: Sequence[str], seeds: int, chosen: Sequence[Method]
) -> None:
    """InputError, before anything is trained, for what cannot be compared."""
    for name in protocols:
        settings_of(name)
    if unknown := [name for name in equal if name not in EQUAL]:
        raise InputError(f"equal is {unknown[0]!r}, must be among {', '.join(EQUAL)}")
    if not datasets or not protocols or not equal or seeds < 1:
        raise InputError("datasets, protocols, equal and seeds must be at least one each")
    size = chosen[0].model().config.image_size
    for data in datasets:
        if not data.is_complete:
            raise InputError(f"{data.name}: is no complete grid of factors with one image each, which the scores need")
        if data.image_size != size:
            raise InputError(f"{data.name}: images of {data.image_size}, the methods take {size}")


def _planned(
    chosen: Sequence[Method], costs: dict[str, float], steps: int, seeds: int, equal: Sequence[str]
) -> Iterator[Work]:
    """All trainings, the whole table of one seed first."""
    for seed in range(seeds):
        for one in chosen:
            if one.name == UNTRAINED:
                yield Work(one, 0, seed, tuple(equal))
                continue
            taken = {name: steps if name == "samples" else steps_for(one.name, costs, steps) for name in equal}
            for count in dict.fromkeys(taken.values()):
                yield Work(one, count, seed, tuple(name for name in equal if taken[name] == count))


def steps_for(name: str, costs: dict[str, float], steps: int) -> int:
    """How many steps of a method take as long as `steps` of the reference; as many, if that is near."""
    ratio = costs[REFERENCE] / costs[name]
    return steps if abs(ratio - 1) <= NEAR else max(1, round(steps * ratio))


def _costs(
    path: Path, chosen: Sequence[Method], dataset: Dataset, batch_size: int, device: str, say: Callable[[str], None]
) -> dict[str, float]:
    """Seconds of a step of each method and the reference; those in the file, if they are of this batch and device."""
    about = {"batch_size": batch_size, "device": torch.device(device).type, "threads": torch.get_num_threads()}
    kept = read_json(path) if path.is_file() else {}
    if kept and (not isinstance(kept, dict) or {name: kept.get(name) for name in about} != about):
        raise InputError(f"{path}: is of other settings than {about}; use another folder")
    costs: dict[str, float] = kept.get("seconds", {})
    times = costs.values() if isinstance(costs, dict) else [None]
    if (kept and REFERENCE not in costs) or not all(isinstance(time, float) and time > 0 for time in times):
        raise InputError(f"{path}: must hold the seconds of a step of {REFERENCE} and others; it is damaged")
    needed = [one for one in chosen if one.name != UNTRAINED and one.name not in costs]
    if not needed:
        return costs
    say(f"timing a step of each method, side by side: {', '.join(one.name for one in needed)}")
    beside = {METHODS[REFERENCE].name: METHODS[REFERENCE]} | {one.name: one for one in needed}
    found = time_steps(
        {name: one.steps(batch_size, device) for name, one in beside.items()}, dataset, batch_size, device
    )
    speed = costs.get(REFERENCE, found[REFERENCE]) / found[REFERENCE]  # of this machine now, by what was timed before
    costs |= {name: seconds * speed for name, seconds in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_metrics(path, about | {"seconds": costs})
    return costs


def time_steps(makers: dict[str, Advance], dataset: Dataset, batch_size: int, device: str) -> dict[str, float]:
    """Seconds of a step of each, the least of ROUNDS in which all take turns: other work beside it only adds."""
    rows = np.arange(batch_size) % len(dataset)
    images, indices = (torch.from_numpy(a).to(device) for a in (dataset.images(rows), rows))
    on_gpu = torch.device(device).type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time

    def seconds(advance: Advance) -> float:
        began = clock()
        for _ in range(TIMED):
            advance(images, indices)
        if on_gpu:
            torch.cuda.synchronize()
        return (clock() - began) / TIMED

    for advance in makers.values():
        seconds(advance)
    rounds = [{name: seconds(advance) for name, advance in makers.items()} for _ in range(ROUNDS)]
    return {name: min(one[name] for one in rounds) for name in makers}


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    """InputError where the folder's rows are of other settings, which no table may mix."""
    kept = read_json(path) if path.is_file() else settings
    for name, value in settings.items():
        if not isinstance(kept, dict) or kept.get(name) != value:
            was = kept.get(name) if isinstance(kept, dict) else kept
            raise InputError(f"{path}: is of {name} {was!r}, cannot go on with {value!r}; use another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_metrics(path, settings)


def _begun(path: Path, work: Work, data: Dataset, costs: dict[str, float], settings: dict[str, Any]) -> dict[str, Any]:
    """The row of a file, or a new one without scores."""
    about, own = describe(data), {name: value for name, value in settings.items() if name != "steps"}
    if path.is_file():
        row = read_row(path)
        if row["data"]["sha256"] != about["sha256"]:
            raise InputError(f"{path}: is of other images than {data.name}; use another folder, or rename the data")
        if other := [name for name, value in own.items() if row[name] != value]:
            raise InputError(f"{path}: is of {other[0]} {row[other[0]]!r}, not {own[other[0]]!r}; use another folder")
        return row
    return {
        "method": work.method.name, "spec": data.spec or data.name, "data": about, "seed": work.seed, **own,
        "equal": list(work.equal), "steps": work.steps, "seconds": work.steps * costs.get(work.method.name, 0.0),
        "scores": {}, "protocols": {}, "version": __version__,
    }  # fmt: skip


def _trained(work: Work, data: Dataset, run: Path, batch_size: int, device: str) -> ConceptModel:
    """The model of a training in the folder `run`, which is finished first."""
    torch.manual_seed(work.seed)
    if work.method.name == UNTRAINED:
        return untrained(work.method.model().to(device), data, work.seed)
    work.method.train(run, data, steps=work.steps, batch_size=batch_size, seed=work.seed, device=device)
    return load_concepts(run / "model", device=device)


def _score(
    row: dict[str, Any], model: ConceptModel, data: Dataset, run: Path, protocols: Sequence[str], pairs: int
) -> None:
    """Put scores of these protocols into a row; those of what is drawn by the first of all."""
    row["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for protocol in protocols:
        first = not row["scores"] and row["method"] != UNTRAINED
        with stages(f"{row['method']} {protocol}") as report:
            result = evaluate(
                model, data, metrics=CODES + (DRAWN if first else ()), protocol=protocol, pairs=pairs, progress=report
            )
        row["scores"][protocol] = {title: result[metric][field] for metric, field, title in score_fields([result])}
        row["protocols"][protocol] = result["protocol"]
        if first:
            write_metrics(run / "metrics.json", {"trained": result})


def _word(data: Dataset) -> str:
    """The data's specification as a part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in Path(data.spec or data.name).name)
