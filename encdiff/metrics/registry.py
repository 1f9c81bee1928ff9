"""Every metric of codes and factors by name, called alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from encdiff.errors import InputError
from encdiff.metrics.beta_vae import beta_vae_score_rows
from encdiff.metrics.dci import dci, dci_quick
from encdiff.metrics.downstream import downstream
from encdiff.metrics.factor_vae import factor_vae_score_rows
from encdiff.metrics.flatness import flatness
from encdiff.metrics.infomec import infomec
from encdiff.metrics.irs import irs
from encdiff.metrics.mcc import mcc
from encdiff.metrics.mig import mig
from encdiff.metrics.modularity import explicitness, modularity
from encdiff.metrics.samples import check_samples, split_rows
from encdiff.metrics.sap import sap
from encdiff.metrics.tad import tad
from encdiff.metrics.unsupervised import unsupervised

Progress = Callable[[str, int, int], None]  # metric, done, total


@dataclass(frozen=True)
class Metric:
    """A metric behind one signature; call it as `metric(codes, factors, seed=0, ...)`."""

    title: str  # for tables
    headline: str  # which number of the result is the score
    function: Callable[..., dict]
    fits: bool = True  # takes train and test rows: learns from the ones, is scored on the others
    seeded: bool = False
    slow: bool = False  # takes n_jobs and progress(done, total)
    grid: bool = False  # needs every combination of the factors, so all rows there are
    further: Mapping[str, str] = field(default_factory=dict)  # scores beside the headline, field -> title

    def __call__(
        self,
        codes: np.ndarray,
        factors: np.ndarray,
        *,
        test_codes: np.ndarray | None = None,
        test_factors: np.ndarray | None = None,
        seed: int = 0,
        **options,
    ) -> dict[str, float | int | str | list | None]:
        """The function's result as JSON can hold it, for codes (n, N) floats and factors (n, F) integers.

        A metric that fits something does so on these rows and is scored on the test rows; without them a split of the
        rows by `seed`, four fifths to one, takes their place. Any other metric is of the test rows, if given, else of
        these. `options` go to the function. A score that is undefined is None and `undefined` says why.
        """
        if (test_codes is None) != (test_factors is None):
            raise InputError("test_codes and test_factors must be given together")
        codes, factors = np.asarray(codes), np.asarray(factors)
        rows: tuple
        if self.fits and test_codes is None:
            rows = split_rows(codes, factors, seed)
        elif self.fits:
            rows = codes, factors, test_codes, test_factors
        else:
            rows = (codes, factors) if test_codes is None else (test_codes, test_factors)
        return _plain(self.function(*rows, **({"seed": seed} if self.seeded else {}), **options))


FLATNESS = {
    "flatness_l2": "straightness",
    "axis_ratio": "traversals on one axis",
    "linear_ratio": "traversals on a line",
}
UNSUPERVISED = {
    "wasserstein_correlation": "Wasserstein correlation",
    "wasserstein_correlation_norm": "Wasserstein corr. (norm.)",
    "mutual_info_score": "information between codes",
}
DCI = {"completeness": "DCI completeness", "informativeness_test": "DCI informativeness"}
METRICS: dict[str, Metric] = {
    "factor_vae": Metric("FactorVAE score", "eval_accuracy", factor_vae_score_rows, seeded=True),
    "beta_vae": Metric("BetaVAE score", "eval_accuracy", beta_vae_score_rows, seeded=True),
    "dci": Metric("DCI disentanglement", "disentanglement", dci, seeded=True, slow=True, further=DCI),
    "dci_quick": Metric("quick DCI estimate", "quick_disentanglement", dci_quick, seeded=True, slow=True),
    "mig": Metric("MIG", "mig", mig, fits=False),
    "sap": Metric("SAP", "sap", sap),
    "modularity": Metric("modularity", "modularity", modularity, fits=False),
    "explicitness": Metric("explicitness", "explicitness_test", explicitness),
    "irs": Metric("IRS", "irs", irs, fits=False),
    "infomec": Metric("InfoM", "infom", infomec, seeded=True, further={"infoc": "InfoC", "infoe": "InfoE"}),
    "tad": Metric("TAD", "tad", tad, fits=False),
    "downstream": Metric("downstream accuracy", "accuracy_full", downstream, seeded=True, slow=True),
    "mcc": Metric("MCC", "mcc", mcc, fits=False),
    "unsupervised": Metric("total correlation", "total_correlation", unsupervised, fits=False, further=UNSUPERVISED),
    "flatness": Metric("flatness", "flatness", flatness, fits=False, seeded=True, grid=True, further=FLATNESS),
}


def score(
    names: Sequence[str],
    codes: np.ndarray,
    factors: np.ndarray,
    *,
    test_codes: np.ndarray | None = None,
    test_factors: np.ndarray | None = None,
    seed: int = 0,
    factor_names: Sequence[str] = (),
    options: Mapping[str, Mapping] | None = None,
    n_jobs: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict]:
    """Several metrics of METRICS on the same rows: name -> result; arguments as for `Metric.__call__`.

    factor_names: used in messages. options: keyword arguments by metric, {"mig": {"bins": 10}}. n_jobs: processes for
    the slow ones. `progress(name, done, total)` is called after each part of a slow metric and after each other one.
    Raises InputError for an unknown metric and for rows that `check_samples` refuses, before anything is computed.
    """
    options = options or {}
    for name in (*names, *options):
        if name not in METRICS:
            raise InputError(f"metric is {name!r}; it must be one of {', '.join(METRICS)}")
    check_samples(codes, factors, factor_names=factor_names)
    results = {}
    for name in names:
        metric, given = METRICS[name], dict(options.get(name, {}))
        if metric.slow:
            given.setdefault("n_jobs", n_jobs)
            given.setdefault("progress", progress and partial(progress, name))
        results[name] = metric(codes, factors, test_codes=test_codes, test_factors=test_factors, seed=seed, **given)
        if progress and not metric.slow:
            progress(name, 1, 1)
    return results


def _plain(result: Mapping) -> dict:
    return {
        key: value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value for key, value in result.items()
    }
