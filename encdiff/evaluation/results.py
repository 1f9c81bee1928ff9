"""Scores on disk: written whole, read back with every number a number, so that tables and pictures can rely on them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encdiff.errors import InputError
from encdiff.evaluation.drawn import DRAWN
from encdiff.files.reading import read_json
from encdiff.files.temporaries import atomic_path
from encdiff.metrics import METRICS


def write_metrics(path: str | Path, results: Mapping) -> None:
    """Write `results` as JSON, whole or not at all; InputError, and no file, if a number is not finite."""
    try:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise InputError(f"results for {path} hold a NaN or infinite number; JSON needs finite ones") from None
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def read_scores(path: str | Path, remedy: str = "evaluate again") -> dict[str, dict]:
    """The results in a `metrics.json`, "trained" among them; InputError, ending in `remedy`, for anything else."""
    try:
        found = read_json(path)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    results = found if isinstance(found, dict) else {}
    if "trained" not in results or not all(map(_is_result, results.values())):
        raise InputError(f"{path}: not the scores that encdiff evaluate writes; {remedy}")
    return results


def _is_result(result: Any) -> bool:
    if not isinstance(result, dict) or not all(isinstance(result.get(k), dict) for k in ("protocol", "data")):
        return False
    protocol = result["protocol"]
    if not isinstance(protocol.get("name"), str) or not _is_number(protocol.get("seed")):
        return False
    fields = {name: (metric.headline, *metric.further) for name, metric in (METRICS | DRAWN).items()}
    fields["fid"] = ("fid",)
    entries = [(result[name], field) for name in fields.keys() & result for field in fields[name]]
    if not all(isinstance(entry, dict) and _is_score(entry, field) for entry, field in entries):
        return False
    if not _is_number(result.get("factor_vae", {}).get("num_active_dims", 0)):
        return False
    return "dci" not in result or _is_matrix(result["dci"].get("importance"), result["data"].get("factor_names"))


def _is_score(entry: Mapping, field: str) -> bool:
    if entry.get(field, "") is None:
        return isinstance(entry.get("undefined"), str)
    return _is_number(entry.get(field))


def _is_matrix(rows: Any, names: Any) -> bool:
    if not isinstance(rows, list) or not rows or not isinstance(names, list):
        return False
    whole = all(isinstance(row, list) and len(row) == len(names) and all(map(_is_number, row)) for row in rows)
    return whole and len(names) > 0 and all(isinstance(name, str) for name in names)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
