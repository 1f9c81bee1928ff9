"""Evaluation protocols: which rows of codes and factors each metric sees; metrics run on them, over several seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from encdiff.errors import InputError
from encdiff.metrics import METRICS, beta_vae_score, factor_vae_score, sample_factors
from encdiff.metrics.factor_vae import check_at_least, check_factor_sizes
from encdiff.metrics.flatness import check_combinations
from encdiff.metrics.samples import check_samples, split_rows

Report = Callable[[str, int, int], None]  # stage, done, total

DEFAULT = ("factor_vae", "dci")  # what the method's figures are in
DRAW = 16  # factors are drawn this many at a time: it fixes which samples a seed means


@dataclass(frozen=True)
class Protocol:
    """Everything besides codes and factors that a score depends on; the defaults are those of the published figures."""

    seed: int = 0
    code: str = "scalars"  # the encoder's N raw scalars, no PCA
    subset: str = "all"  # of the rows; "80/20": metrics learn from four fifths, drawn by the seed, and score the rest
    factor_vae_variance: int = 10_000
    factor_vae_train: int = 10_000
    factor_vae_eval: int = 5_000
    factor_vae_batch: int = 64
    factor_vae_threshold: float = 0.05  # on the standard deviation of a code
    beta_vae_train: int = 10_000
    beta_vae_eval: int = 5_000
    beta_vae_batch: int = 64
    dci_train: int = 10_000  # samples of DCI and of every metric but FactorVAE's and BetaVAE's
    dci_test: int = 5_000


PROTOCOLS = {
    "paper": Protocol(),
    "heldout": Protocol(subset="80/20"),
    "quick": Protocol(
        factor_vae_variance=2_000, factor_vae_train=2_000, factor_vae_eval=1_000, beta_vae_train=1_000,
        beta_vae_eval=500, dci_train=1_000, dci_test=500,
    ),
}  # fmt: skip


def settings_of(protocol: str, seed: int = 0, **overrides: Any) -> Protocol:
    """The named protocol with a seed and some fields changed; InputError for an unknown name or field."""
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}; it must be one of {', '.join(PROTOCOLS)}")
    known = {field.name for field in fields(Protocol)} - {"seed", "code", "subset"}
    if unknown := sorted(set(overrides) - known):
        raise InputError(f"{unknown[0]} is no field of the protocol; fields are {', '.join(sorted(known))}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must be in 0..2**32-1")
    settings = replace(PROTOCOLS[protocol], seed=seed, **overrides)
    check_at_least(1, dci_train=settings.dci_train, dci_test=settings.dci_test)
    return settings


def named(protocol: str, settings: Protocol) -> dict:
    """The protocol as it is stored with a score; its name is "custom" once a field is changed."""
    same = settings == replace(PROTOCOLS[protocol], seed=settings.seed)
    return {"name": protocol if same else "custom"} | asdict(settings)


def check_grid(images: int, factor_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes; InputError unless so many images are a complete grid of them."""
    sizes = check_factor_sizes(factor_sizes)
    if np.prod(sizes) != images:
        raise InputError(f"there are {images} images; a complete grid of factors {sizes} is needed")
    return sizes


def score_grid(
    codes: np.ndarray,
    factor_sizes: Sequence[int],
    settings: Protocol,
    metrics: Sequence[str] = DEFAULT,
    *,
    n_jobs: int | None = None,
    report: Report | None = None,
) -> dict[str, dict]:
    """Metrics of codes (prod(factor_sizes), N), one row per image of the complete grid, last factor fastest.

    FactorVAE and BetaVAE scores draw factors from the grid, as published; flatness gets all of it; the others get
    samples of it, drawn as published for DCI. With subset "80/20" all get rows, as by `score_rows`. Returns name ->
    result.
    """
    sizes = check_grid(len(codes), factor_sizes)
    factors = np.stack(np.unravel_index(np.arange(len(codes)), sizes), axis=1)
    if settings.subset != "all":
        return score_rows(codes, factors, settings, metrics, n_jobs=n_jobs, report=report)
    from_grid = {"factor_vae": factor_vae_score, "beta_vae": beta_vae_score}
    rows = _draw(codes, sizes, settings) if set(metrics) - from_grid.keys() else ()

    def run(name: str, **given) -> dict:
        if name in from_grid:
            return from_grid[name](codes, sizes, seed=settings.seed, **given)
        if METRICS[name].grid:
            return METRICS[name](codes, factors, seed=settings.seed, **given)
        return _on_rows(name, rows, settings.seed, given)

    return _run_all(metrics, run, settings, n_jobs, report)


def score_rows(
    codes: np.ndarray,
    factors: np.ndarray,
    settings: Protocol,
    metrics: Sequence[str] = DEFAULT,
    *,
    factor_names: Sequence[str] = (),
    n_jobs: int | None = None,
    report: Report | None = None,
) -> dict[str, dict]:
    """Metrics of any rows: codes (n, N) floats, factors (n, F) integers; no grid is needed.

    Metrics learn from four fifths of the rows, drawn by the seed, and score the rest, `dci_train` and `dci_test` of
    them at most but for FactorVAE's and BetaVAE's, which draw their batches. Flatness, which learns nothing, gets all
    rows. Raises InputError as the metrics do, and for missing combinations before any is computed.
    """
    codes, factors = np.asarray(codes), np.asarray(factors)
    check_samples(codes, factors, factor_names=factor_names)
    check_traversals(metrics, factors)
    rows = split_rows(codes, factors, settings.seed)
    cut = [part[:most] for part, most in zip(rows, _most(settings), strict=True)]

    def run(name: str, **given) -> dict:
        if METRICS[name].grid:
            return METRICS[name](codes, factors, seed=settings.seed, **given)
        return _on_rows(name, rows if name in ("factor_vae", "beta_vae") else cut, settings.seed, given)

    return _run_all(metrics, run, settings, n_jobs, report)


def check_traversals(metrics: Sequence[str], factors: np.ndarray) -> None:
    """InputError if a metric needs every combination of the factors (n, F) and the rows lack one."""
    if any(name in METRICS and METRICS[name].grid for name in metrics):
        check_combinations(factors)


def summarize(results: Sequence[Mapping[str, Mapping]], metrics: Sequence[str] = DEFAULT) -> dict[str, dict]:
    """Over the results of several seeds, by metric: `values` of its headline, `mean`, `std` (n - 1) and `interval`.

    The interval is the bootstrap's for the mean (95 %, percentiles, 9,999 resamplings); of fewer than three values, or
    where one is undefined, it is None. `further` holds the same of the metric's other scores, and of the number of
    active dimensions, where it has one.
    """
    summary = {}
    for name in metrics:
        further = [field for field in (*METRICS[name].further, "num_active_dims") if field in results[0][name]]
        summary[name] = _summary([result[name][METRICS[name].headline] for result in results])
        if further:
            summary[name]["further"] = {field: _summary([r[name][field] for r in results]) for field in further}
    return summary


def _summary(values: list[float | None]) -> dict:
    numbers = [value for value in values if value is not None]
    known = len(values) > 0 and len(numbers) == len(values)
    interval = None
    if known and len(values) > 2:
        ci = bootstrap((numbers,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
        interval = [float(ci.low), float(ci.high)]
    return {
        "values": values,
        "mean": float(np.mean(numbers)) if known else None,
        "std": float(np.std(numbers, ddof=1)) if known and len(values) > 1 else None,
        "interval": interval,
    }


def _run_all(metrics: Sequence[str], run: Callable[..., dict], settings: Protocol, n_jobs, report) -> dict[str, dict]:
    if isinstance(metrics, str):
        raise InputError(f"metrics is the text {metrics!r}, must be a list of names")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise InputError(f"metric is {unknown[0]!r}; it must be one of {', '.join(METRICS)}")
    results = {}
    for name in metrics:
        given = _options(name, settings)
        if METRICS[name].slow:
            told = report and (lambda done, total, name=name: report(name, done, total))
            given |= {"n_jobs": n_jobs, "progress": told}
        if report:
            report(name, 0, 1)
        results[name] = run(name, **given)
        if report and not METRICS[name].slow:
            report(name, 1, 1)
    return results


def _options(name: str, settings: Protocol) -> dict:
    if name == "factor_vae":
        return {
            "num_variance": settings.factor_vae_variance, "num_train": settings.factor_vae_train,
            "num_eval": settings.factor_vae_eval, "batch_size": settings.factor_vae_batch,
            "threshold": settings.factor_vae_threshold,
        }  # fmt: skip
    if name == "beta_vae":
        return {
            "num_train": settings.beta_vae_train, "num_eval": settings.beta_vae_eval,
            "batch_size": settings.beta_vae_batch,
        }  # fmt: skip
    return {}


def _on_rows(name: str, rows: Sequence[np.ndarray], seed: int, given: Mapping) -> dict:
    codes, factors, test_codes, test_factors = rows
    if not METRICS[name].fits:  # as published on the greater set
        return METRICS[name](codes, factors, seed=seed, **given)
    return METRICS[name](codes, factors, test_codes=test_codes, test_factors=test_factors, seed=seed, **given)


def _draw(codes: np.ndarray, sizes: tuple[int, ...], settings: Protocol) -> list[np.ndarray]:
    """Train codes and factors, test codes and factors, from one `RandomState(seed)` in the published order."""
    rng, rows = np.random.RandomState(settings.seed), []
    for size in (settings.dci_train, settings.dci_test):
        draws = [min(DRAW, size - start) for start in range(0, size, DRAW)]
        factors = np.concatenate([sample_factors(rng, sizes, draw) for draw in draws])
        rows += [codes[np.ravel_multi_index(tuple(factors.T), sizes)], factors]
    return rows


def _most(settings: Protocol) -> tuple[int, int, int, int]:
    return settings.dci_train, settings.dci_train, settings.dci_test, settings.dci_test
