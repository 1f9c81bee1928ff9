"""Scores of the codes of any model, from a file."""

import hashlib
import time
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from encdiff import __version__
from encdiff.data.npz import open_zip, read_array
from encdiff.errors import InputError
from encdiff.evaluation.protocol import (
    DEFAULT,
    Protocol,
    Report,
    score_rows,
    settings_of,
)
from encdiff.evaluation.scoring import over_seeds
from encdiff.files.reading import refuse_special
from encdiff.metrics.factor_vae import check_at_least


def evaluate_codes(
    path: str | Path,
    *,
    metrics: Sequence[str] = DEFAULT,
    seed: int = 0,
    seeds: int = 1,
    n_jobs: int | None = None,
    progress: Report | None = None,
    **overrides: int | float,
) -> dict:
    """Scores of the codes of any model, by the protocol "heldout": as `evaluate`, from a file.

    path: an `.npz` with `codes` (n, N) floats, `factors` (n, F) integers and, if you like, `factor_names` (F,). Raises
    InputError, naming the file, for what is not so.
    """
    codes, factors, names = read_codes(path)
    settings = settings_of("heldout", seed, **overrides)
    check_at_least(1, seeds=seeds)
    began = time.perf_counter()

    def score(settings: Protocol) -> dict[str, dict]:
        return score_rows(codes, factors, settings, metrics, factor_names=names, n_jobs=n_jobs, report=progress)

    digest = hashlib.sha256(codes.tobytes() + factors.tobytes()).hexdigest()
    scores = [score(replace(settings, seed=settings.seed + i)) for i in range(seeds)]
    return over_seeds(scores, "heldout", settings, metrics) | {
        "data": {"name": Path(path).name, "rows": len(codes), "factor_names": names, "sha256": digest},
        "version": __version__,
        "seconds": {"score": time.perf_counter() - began},
    }


def read_codes(path: str | Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """`codes`, `factors` and `factor_names` of an `.npz`; nothing in it is unpickled."""
    held = _read(Path(path), "codes", "factors", "factor_names")
    for name in ("codes", "factors"):
        if name not in held:
            raise InputError(f"{path}: has no array {name!r}; it must hold codes (n, N) and factors (n, F)")
    codes, factors = held["codes"], held["factors"]
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors):
        raise InputError(f"{path}: codes are {codes.shape} and factors {factors.shape}; must be (n, N) and (n, F)")
    names = held.get("factor_names", np.array([f"factor {i}" for i in range(factors.shape[1])], str))
    if names.dtype.kind != "U" or names.shape != factors.shape[1:]:
        said = f"{names.size} factor_names for {factors.shape[1]} factors"
        raise InputError(f"{path}: {said}, of type {names.dtype}; must be one text for each")
    return codes, factors, names.tolist()


def read_codes_alone(path: str | Path) -> np.ndarray:
    """`codes` (n, N) of an `.npz`, whatever else it holds; nothing in it is unpickled."""
    codes = _read(Path(path), "codes").get("codes")
    if codes is None or codes.ndim != 2:
        raise InputError(f"{path}: codes are {'missing' if codes is None else codes.shape}; must be an array (n, N)")
    return codes


def _read(path: Path, *names: str) -> dict[str, np.ndarray]:
    """Those of the named arrays that an `.npz` holds."""
    refuse_special(path)
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not an .npz of arrays (no zip file)")
    with open_zip(path) as archive:
        return {name: read_array(path, archive, name) for name in names if f"{name}.npy" in archive.namelist()}
