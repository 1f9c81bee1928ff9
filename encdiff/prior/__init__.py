"""Priors over codes: sampling without a source image, and judging what comes out.

Import the names below from here; imports models, metrics, data and what lies below.
"""

from pathlib import Path
from typing import Any

from encdiff.errors import InputError
from encdiff.files.checkpoint import load_tensors
from encdiff.prior.base import Prior, Progress, file_of, read_about
from encdiff.prior.codes import dataset_codes
from encdiff.prior.diffusion import DiffusionPrior
from encdiff.prior.judging import format_judgement, judge
from encdiff.prior.mixture import MixturePrior

__all__ = [
    "DiffusionPrior", "MixturePrior", "Prior", "dataset_codes", "fit_prior", "format_judgement", "judge", "load_prior",
]  # fmt: skip

KINDS: dict[str, type[MixturePrior] | type[DiffusionPrior]] = {
    "mixture": MixturePrior, "diffusion": DiffusionPrior,
}  # fmt: skip


def fit_prior(
    codes: Any, kind: str = "mixture", *, components: int | None = None, seed: int = 0, progress: Progress | None = None
) -> Prior:
    """A prior fitted to codes (n, N) or (n, N, m), array or tensor: "mixture", of `components`, or "diffusion".

    `progress(done, total)` follows. Raises InputError for another kind, components of the diffusion, and what
    `MixturePrior.fit` and `DiffusionPrior.fit` refuse.
    """
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}, must be one of {', '.join(KINDS)}")
    if kind == "diffusion":
        if components is not None:
            raise InputError(f"components is {components}, must be left out: it belongs to the mixture")
        return DiffusionPrior.fit(codes, seed=seed, progress=progress)
    given = {} if components is None else {"components": components}
    return MixturePrior.fit(codes, **given, seed=seed, progress=progress)


def load_prior(path: str | Path) -> Prior:
    """The prior that `save` wrote to this file or folder; InputError for another or a damaged file."""
    file = file_of(path)
    tensors, about = load_tensors(file)
    if about.get("prior") not in KINDS:
        raise InputError(f"{file}: is no prior of kind {' or '.join(KINDS)}; is it a prior that save wrote?")
    return KINDS[about["prior"]].from_tensors(tensors, *read_about(about, str(file)), str(file))
