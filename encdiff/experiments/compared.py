"""What a comparison came to: means, intervals and tests of its rows; tables and figures of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from encdiff.errors import InputError
from encdiff.evaluation import write_metrics
from encdiff.experiments.compared_pictures import draw_costs, draw_scores
from encdiff.experiments.methods import METHODS, REFERENCE
from encdiff.experiments.phases import markdown_table
from encdiff.experiments.significance import bootstrap_interval, pairwise
from encdiff.files.reading import read_json
from encdiff.files.temporaries import atomic_path

SHOWN = {  # a score's title: its column
    "FactorVAE score": "FactorVAE", "DCI disentanglement": "DCI", "DCI completeness": "completeness",
    "DCI informativeness": "informativeness", "MIG": "MIG", "MCC": "MCC",
    "InfoM": "InfoM", "InfoC": "InfoC", "InfoE": "InfoE",
    "swaps exact": "swaps exact", "reconstructions exact": "rec. exact", "PSNR of reconstructions": "PSNR",
}  # fmt: skip
TELLS = 0.05  # a corrected p below it is called a difference


FIELDS: dict[str, type | tuple[type, ...]] = {
    "method": str, "spec": str, "data": dict, "seed": int, "equal": list, "steps": int, "seconds": (int, float),
    "scores": dict, "protocols": dict, "batch_size": int, "pairs": int, "device": str,
}  # fmt: skip


def read_row(path: Path) -> dict[str, Any]:
    """A row that `compare` wrote; InputError for anything else."""
    row = read_json(path)
    whole = isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in FIELDS.items())
    if (
        not whole
        or row["method"] not in METHODS
        or "sha256" not in row["data"]
        or not all(map(_scored, row["scores"].values()))
    ):
        raise InputError(f"{path}: is no row of a comparison; remove it to have it made")
    return row


def _scored(scores: Any) -> bool:
    return isinstance(scores, dict) and all(isinstance(value, int | float | str | None) for value in scores.values())


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a folder of `compare`, by method and seed; InputError where two are of one place in a table."""
    order, seen = list(METHODS), set()
    rows = []
    for path in sorted((out / "rows").glob("*.json")):
        rows.append(row := read_row(path))
        for equal in row["equal"]:
            place = row["spec"], row["method"], row["seed"], equal
            if place in seen:
                raise InputError(f"{path}: is of the method, seed and cost of another row; remove one of them")
            seen.add(place)
    return sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"]))


def summarised(rows: Sequence[Mapping], protocol: str, equal: str) -> dict[str, dict[str, dict]]:
    """Of the rows at equal samples or seconds: score, method -> its `values` by seed, mean, deviation and interval."""
    found: dict[str, dict[str, dict]] = {}
    for title in SHOWN:
        for name in METHODS:
            values = [
                row["scores"][protocol][title]
                for row in rows
                if row["method"] == name and equal in row["equal"] and title in row["scores"].get(protocol, {})
            ]
            if values and not any(isinstance(value, str | None) for value in values):
                found.setdefault(title, {})[name] = {
                    "values": values, "mean": float(np.mean(values)),
                    "deviation": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                    "interval": bootstrap_interval(values),
                }  # fmt: skip
    return found


def write_tables(out: Path) -> None:
    """Write `compare.json`, `compare.md` and, for each data set, pictures of the scores and of what they cost."""
    rows = read_rows(out)
    if not rows:
        return
    parts, everything = [_about(rows)], []
    for data in dict.fromkeys(row["spec"] for row in rows):
        own = [row for row in rows if row["spec"] == data]
        for equal in ("seconds", "samples"):
            for protocol in dict.fromkeys(p for row in own for p in row["scores"]):
                found = summarised(own, protocol, equal)
                if not found:
                    continue
                tests = {title: pairwise({n: r["values"] for n, r in by.items()}) for title, by in found.items()}
                everything.append({
                    "data": data, "equal": equal, "protocol": protocol, "scores": found, "tests": tests,
                })  # fmt: skip
                parts.append(_section(own, data, equal, protocol, found, tests))
        first, name = next(iter(own[0]["scores"])), "".join(c if c.isalnum() else "-" for c in data)
        for equal in ("seconds", "samples"):
            if found := summarised(own, first, equal):
                draw_scores(found, f"{data}: equal {equal}, protocol {first}", out / f"scores-{name}-{equal}.png")
        draw_costs(own, first, out / f"cost-{name}.png")
    write_metrics(out / "compare.json", {"comparisons": everything})
    with atomic_path(out / "compare.md") as temporary:
        temporary.write_text("\n".join(parts), "utf-8", "surrogateescape")


def _about(rows: Sequence[Mapping]) -> str:
    seeds, pairs = len({row["seed"] for row in rows}), rows[0].get("pairs")
    clock = "of the processor" if rows[0]["device"] == "cpu" else f"on {rows[0]['device']}"
    return (
        "Means of the seeds, and the middle 95 % of bootstrapped means: how far these seeds differ. Seconds are of "
        f"training alone, {clock}; batches of {rows[0]['batch_size']}; {seeds} seeds; swaps of {pairs} pairs for each "
        "factor. `>` and `<`: above or below EncDiff, by Welch's t-test of the seeds with Holm's correction over all "
        f"pairs of methods, for each score of each table by itself, p below {TELLS:g}. Few seeds tell few.\n"
    )


def _section(
    rows: Sequence[Mapping], data: str, equal: str, protocol: str, found: Mapping, tests: Mapping[str, list[dict]]
) -> str:
    titles = list(found)
    lines = []
    for name in METHODS:
        own = [row for row in rows if row["method"] == name and equal in row["equal"]]
        if not own:
            continue
        cells = [_cell(found[title].get(name), _against(tests[title], name)) for title in titles]
        steps, seconds = {row["steps"] for row in own}, np.mean([row["seconds"] for row in own])
        lines.append([name, str(len(own)), " and ".join(map(str, sorted(steps))), f"{seconds:.0f}", *cells])
    table = markdown_table(("method", "seeds", "steps", "seconds", *(SHOWN[t] for t in titles)), lines)
    return f"## {data}: equal {equal}, protocol {protocol}\n\n{table}\n{_winners(found, tests)}\n"


def _cell(of: Mapping | None, mark: str) -> str:
    if of is None:
        return ""
    low, high = of["interval"]
    digits = 1 if of["mean"] > 2 else 3
    mean = f"{of['mean']:.{digits}f}{mark}"
    return mean if len(of["values"]) == 1 else f"{mean} ({low:.{digits}f} to {high:.{digits}f})"


def _against(tests: Sequence[Mapping], name: str) -> str:
    """Whether a method is told from the reference: above it, below it, or not."""
    for test in tests:
        if {test["a"], test["b"]} == {name, REFERENCE} and test["corrected"] < TELLS:
            above = (test["difference"] > 0) == (test["a"] == name)
            return " >" if above else " <"
    return ""


def _winners(found: Mapping[str, Mapping[str, Mapping]], tests: Mapping[str, list[dict]]) -> str:
    """Of each score who has the greatest mean, and who cannot be told from it."""
    lines = []
    for title, by in found.items():
        best = max(by, key=lambda name: by[name]["mean"])
        told = {
            ({test["a"], test["b"]} - {best}).pop()
            for test in tests[title]
            if best in (test["a"], test["b"]) and test["corrected"] < TELLS
        }
        near = [name for name in by if name != best and name not in told]
        rest = f"not told from it: {', '.join(near)}" if near else "told from all others" if told else "alone"
        lines.append(f"- {SHOWN[title]}: **{best}** {by[best]['mean']:.3f}; {rest}.")
    return "\n".join(lines)
