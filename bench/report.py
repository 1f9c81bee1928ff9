"""Turn the JSON of a benchmark run into tables, plots and a list of what became faster or slower.

    python -m bench.report RUN.json [MORE.json ...] [--against STORED] [--out FOLDER] [--store FOLDER]

Prints Markdown: per op one table, every time as a ratio to the published form and to the best stock form of the same
run, dtype and shape (above 1: this one is faster). On a GPU a time is that of one of many calls in a captured graph, or
between two events and then marked so; "eager host" is what the host takes to issue a call. `--out` also writes
report.md and a plot per op. `--against` names a stored JSON, or a folder of them, and compares with the one of this
device: exit status 1 and a list where a time moved by more than 10 %. `--store` keeps this run in a folder under its
device's name, without the raw samples.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

STOCK = ("published_compiled", "eager_compiled", "compiled", "diffusers", "torch")  # what else a user could take today
LIMIT = 0.10
COLUMNS = (
    "impl", "dtype", "time", "vs published", "vs best stock", "eager host", "images/s", "launches", "peak MiB", "GB/s",
    "TFLOP/s", "% of bound",
)  # fmt: skip


class BadFile(Exception):
    """A file that is no benchmark run; the message says why."""


class Case(NamedTuple):
    """One benchmark; those that share `key` differ by `impl` alone."""

    op: str
    phase: str
    shape: str
    dtype: str
    impl: str
    seconds: float  # median: by the GPU's clock where there is one, else of the calls
    info: dict[str, Any]

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.phase, self.shape, self.dtype


def read(path: Path) -> dict[str, Any]:
    """A run as pytest-benchmark wrote it. Raises BadFile."""
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}: {error}") from None
    if not isinstance(run, dict) or not {"machine_info", "benchmarks"} <= run.keys():
        raise BadFile(f"{path}: not the JSON of pytest --benchmark-json")
    return run


def merge(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One run with the benchmarks of all, without their raw samples; all must be of one device."""
    devices = {device_of(run) for run in runs}
    if len(devices) != 1:
        raise BadFile(f"the runs are of {len(devices)} devices, must be of one: {'; '.join(sorted(devices))}")
    benchmarks = [b for run in runs for b in run["benchmarks"]]
    slim = [b | {"stats": {k: v for k, v in b["stats"].items() if k != "data"}} for b in benchmarks]
    return runs[0] | {"benchmarks": slim}


def cases(run: dict[str, Any]) -> list[Case]:
    """The benchmarks that say what they measure, in a fixed order: of each key, the published form first."""
    found = []
    for benchmark in run["benchmarks"]:
        info = benchmark.get("extra_info", {})
        if "op" in info:
            labels = (
                str(info.get(name, "")).removeprefix("torch.") for name in ("op", "phase", "shape", "dtype", "impl")
            )
            found.append(Case(*labels, info.get("seconds") or benchmark["stats"]["median"], info))
    return sorted(found, key=lambda c: (*c.key, c.impl != "published", c.seconds))


def device_of(run: dict[str, Any]) -> str:
    """What times can be compared on: the GPU, or the processor and how many threads of it."""
    machine = run["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine.get("processor") or machine.get("machine", "unknown")
    return machine.get("gpu") or f"{cpu}, {machine.get('threads', '?')} threads"


def heading(run: dict[str, Any]) -> str:
    machine, commit = run["machine_info"], run.get("commit_info", {})
    versions = [f"Python {machine.get('python_version', '?')}"]
    versions += [f"{name} {machine[name]}" for name in ("torch", "triton", "cuda") if machine.get(name)]
    changed = " with changes" if commit.get("dirty") else ""
    return (
        f"{device_of(run)}; {', '.join(versions)}; commit {str(commit.get('id'))[:12]}{changed}; {run.get('datetime')}"
    )


def baselines(group: Iterable[Case]) -> tuple[float | None, float | None]:
    """Seconds of the published form (eager, where an op has no other) and of the best stock form."""
    times = {case.impl: case.seconds for case in group}
    stock = [times[impl] for impl in STOCK if impl in times]
    return times.get("published", times.get("eager")), min(stock, default=None)


def row(case: Case, published: float | None, stock: float | None) -> list[str]:
    info = case.info
    ratios = [f"{base / case.seconds:.2f}" if base else "" for base in (published, stock)]
    peak = info.get("peak_memory")
    figures = [info.get(name) for name in ("samples_per_second", "launches")]
    rates = [info.get(name) for name in ("gbps", "tflops", "percent_of_bound")]
    eager, mark = info.get("eager_seconds"), ", events" if info.get("timed") == "events" else ""
    return [
        case.impl, case.dtype, duration(case.seconds) + mark, *ratios, duration(eager) if eager else "",
        *map(number, figures),
        number(peak and peak / 2**20), *map(number, rates),
    ]  # fmt: skip


def duration(seconds: float) -> str:
    unit, factor = next((u, f) for u, f in (("s", 1), ("ms", 1e3), ("us", 1e6)) if seconds * f >= 1 or u == "us")
    return f"{seconds * factor:.3g} {unit}"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(run: dict[str, Any]) -> str:
    """Every case in a table per op, one block per phase and shape."""
    lines = [f"Measured on {heading(run)}.", ""]
    for op, of_op in groupby(cases(run), key=lambda c: c.op):
        lines += [f"### {op}", ""]
        for (phase, shape), block in groupby(of_op, key=lambda c: (c.phase, c.shape)):
            lines += [f"{phase}, {shape}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]
            for _, same in groupby(block, key=lambda c: c.key):
                group = list(same)
                lines += [f"| {' | '.join(row(case, *baselines(group)))} |" for case in group]
            lines.append("")
    return "\n".join(lines)


def changes(now: dict[str, Any], stored: dict[str, Any], limit: float = LIMIT) -> list[str]:
    """One line for each case of both runs whose time moved by more than `limit`, the greatest change first."""
    before = {(*case.key, case.impl): case.seconds for case in cases(stored)}
    moved = []
    for case in cases(now):
        was = before.get((*case.key, case.impl))
        if was and abs(case.seconds / was - 1) > limit:
            factor, name = case.seconds / was, f"{case.op} {case.phase} {case.shape} {case.dtype} {case.impl}"
            how = "slower" if factor > 1 else "faster"
            line = f"{name}: {duration(was)} -> {duration(case.seconds)}, {abs(factor - 1):.0%} {how}"
            moved.append((abs(factor - 1), line))
    return [line for _, line in sorted(moved, reverse=True)]


def stored_run(place: Path, now: dict[str, Any], but: list[Path]) -> dict[str, Any] | None:
    """The stored run to compare with: the file itself, or the newest of this device in a folder, `but` these."""
    if place.is_file():
        run = read(place)
        if device_of(run) != device_of(now):
            raise BadFile(f"{place}: of {device_of(run)}, must be of {device_of(now)}")
        return run
    others = {path.resolve() for path in but}
    runs = [read(path) for path in sorted(place.glob("*.json")) if path.resolve() not in others]
    same = [run for run in runs if device_of(run) == device_of(now)]
    return max(same, key=lambda run: str(run.get("datetime")), default=None)


def store(run: dict[str, Any], folder: Path) -> Path:
    """Keep the run as `folder`/<device>.json; the one of this device before it is replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"\W+", "-", device_of(run).lower()).strip("-") + ".json")
    path.write_text(json.dumps(run, indent=1, sort_keys=True) + "\n")
    return path


def plot(run: dict[str, Any], folder: Path) -> list[Path]:
    """A bar chart per op: how many times as fast as the published form each implementation is, per case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    written = []
    for op, of_op in groupby(cases(run), key=lambda c: c.op):
        bars = list(speedups(of_op))
        if not bars:
            continue
        impls = sorted({impl for _, impl, _ in bars})
        colours = {impl: f"C{i}" for i, impl in enumerate(impls)}
        figure, axes = plt.subplots(figsize=(8, 0.6 + 0.22 * len(bars)), layout="constrained")
        axes.barh(range(len(bars)), [b[2] for b in bars], color=[colours[b[1]] for b in bars])
        axes.set_yticks(range(len(bars)), [f"{label}  {impl}" for label, impl, _ in bars], fontsize=6)
        axes.invert_yaxis()
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_xlabel(f"{op}: times as fast as the published form; {device_of(run)}", fontsize=7)
        written.append(folder / f"{op}.png")
        figure.savefig(written[-1], dpi=150)
        plt.close(figure)
    return written


def speedups(of_op: Iterable[Case]) -> Iterable[tuple[str, str, float]]:
    for key, same in groupby(of_op, key=lambda c: c.key):
        group = list(same)
        published, _ = baselines(group)
        if published and len(group) > 1:
            yield from ((" ".join(key[1:]), case.impl, published / case.seconds) for case in group)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json", help="written by pytest --benchmark-json")
    parser.add_argument("--against", type=Path, help="a stored JSON of the same device, or a folder of them")
    parser.add_argument("--out", type=Path, help="folder for report.md and the plots")
    parser.add_argument("--store", type=Path, help="folder in which to keep this run")
    given = parser.parse_args(arguments)
    try:
        run = merge([read(path) for path in given.runs])
        stored = given.against and stored_run(given.against, run, given.runs)
    except BadFile as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(run)
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "report.md").write_text(text)
        plot(run, given.out)
    moved = changes(run, stored) if stored else []
    if given.against:
        print("\n".join([f"{len(moved)} of more than {LIMIT:.0%} changed", *moved]) if stored else "no stored run here")
    if given.store:
        print(f"kept as {store(run, given.store)}")
    return 1 if moved else 0


if __name__ == "__main__":
    sys.exit(main())
