"""Disentanglement metrics: pure functions of codes and factors, by the protocols of the published figures.

`METRICS` names those that need codes and factors only, `score` runs several of them; `udr` needs the codes of several
models; `fid` and `reconstruction`, which need images, are imported from their modules. `docs/metrics.md` says what each
means. Imports errors and files alone.
"""

from encdiff.metrics.beta_vae import beta_vae_score
from encdiff.metrics.dci import completeness, dci, dci_quick, disentanglement
from encdiff.metrics.downstream import downstream
from encdiff.metrics.factor_vae import factor_vae_score
from encdiff.metrics.flatness import flatness
from encdiff.metrics.infomec import infomec
from encdiff.metrics.irs import irs
from encdiff.metrics.mcc import mcc
from encdiff.metrics.mig import mig
from encdiff.metrics.modularity import explicitness, modularity
from encdiff.metrics.registry import METRICS, Metric, score
from encdiff.metrics.sampling import sample_factors
from encdiff.metrics.sap import sap
from encdiff.metrics.tad import tad
from encdiff.metrics.udr import udr
from encdiff.metrics.unsupervised import gaussian_total_correlation, gaussian_wasserstein_correlation, unsupervised

__all__ = [
    "METRICS",
    "Metric",
    "beta_vae_score",
    "completeness",
    "dci",
    "dci_quick",
    "disentanglement",
    "downstream",
    "explicitness",
    "factor_vae_score",
    "flatness",
    "gaussian_total_correlation",
    "gaussian_wasserstein_correlation",
    "infomec",
    "irs",
    "mcc",
    "mig",
    "modularity",
    "sample_factors",
    "sap",
    "score",
    "tad",
    "udr",
    "unsupervised",
]
