"""Disentanglement metrics: pure functions of codes and factors, by the protocol of the published figures."""

from encdiff.metrics.dci import completeness, dci, disentanglement
from encdiff.metrics.factor_vae import factor_vae_score, sample_factors

__all__ = ["completeness", "dci", "disentanglement", "factor_vae_score", "sample_factors"]
