"""MIST's loop against bias: values move toward rare attributes until all are as frequent."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from encdiff.edit.closed_form import Scale, check_tokens
from encdiff.edit.edit import Edit
from encdiff.edit.methods import Values, edit_by
from encdiff.errors import InputError

Shares = Callable[[Any], Sequence[float] | np.ndarray | Tensor]  # the edited model -> (K,)


class Debiased(NamedTuple):
    """What `debias` found."""

    edit: Edit
    shares: list[list[float]]  # (rounds + 1, K): before any edit, then after each round
    balanced: bool  # whether the last shares are within the tolerance of 1/K

    def __repr__(self) -> str:
        last = " ".join(f"{share:.2f}" for share in self.shares[-1][:8]) + (" ..." if len(self.shares[-1]) > 8 else "")
        said, rounds = "" if self.balanced else "not ", len(self.shares) - 1
        return f"Debiased({self.edit}, {said}balanced after {rounds} round{'s' * (rounds != 1)}: {last})"


def debias(
    model: Any,
    edited: Tensor,
    attributes: Tensor,
    shares: Shares,
    keep: Tensor | None = None,
    *,
    method: str = "mist",
    rate: float = 0.1,
    tolerance: float = 0.05,
    rounds: int = 150,
    lam: float = 0.5,
    edit_scale: Scale = 1.0,
    keep_scale: Scale = 0.2,
    name: str = "debias",
    progress: Callable[[int, Sequence[float]], None] | None = None,
) -> Debiased:
    """An edit after which K attributes are equally frequent in what the model draws, as a given judge reads it.

    In every round the wanted values move by sum_j w_j |W c| u_j / |u_j|, with u_j = W c_j the value of attribute j and
    w_j = rate (1/K - r_j), r_j its measured share, until |r_j - 1/K| < tolerance for all. The steps add up, and every
    round's edit is solved from the model's own weights, so that kept tokens do not drift.

    Args:
        model: as for `mist`. It is edited and restored in every round, and is in the end as it was.
        edited: tokens c (n, D), such as one prompt's, or those of a factor's concepts at each of its values.
        attributes: tokens c_j (K, D), or (K, n, D) where each edited token has attributes of its own, as the tokens of
            several concepts do. For joint shares of several factors K is their product.
        shares: called with the edited model before the first round and after each; gives the shares (K,), none
            negative; they need not add up to 1, since a judge may find none of the attributes.
        rate, tolerance, rounds: of the loop; the defaults are the paper's.
        progress: called with (round, shares).

    Returns the edit of the last round, which is the model's own weights where no round was needed.

    Raises InputError for shapes that do not fit, shares that are not K numbers in 0..1, and what `mist` refuses.

    Source: arXiv 2403.19738.
    """
    for said, number, low, high in (
        ("rate", rate, 0, 1e6),
        ("tolerance", tolerance, 0, 1),
        ("rounds", rounds, -1, 1e6),
    ):
        if not isinstance(number, Real) or not low < number <= high:
            raise InputError(f"{said} is {number!r:.80}, must be a number above {low} and at most {high:g}")
    if not callable(shares):
        raise InputError(f"shares is a {type(shares).__name__}, must be a function: the edited model -> K shares")
    tokens = _attributes(attributes, len(check_tokens(edited, "edited")))
    moved = torch.zeros(len(tokens), dtype=torch.float64)  # sum of w_j over the rounds
    scales: dict[str, Any] = {"lam": lam, "edit_scale": edit_scale, "keep_scale": keep_scale}
    found: list[list[float]] = []
    while True:
        edit = edit_by(method, model, edited, _moved(edited, tokens, moved), keep, name=name, **scales)
        found.append(_measured(model, edit, shares, len(tokens)))
        if progress:
            progress(len(found) - 1, found[-1])
        ahead = 1 / len(tokens) - torch.tensor(found[-1], dtype=torch.float64)
        balanced = bool(ahead.abs().max() < tolerance)
        if balanced or len(found) > rounds:
            return Debiased(edit, found, balanced)
        moved = moved + rate * ahead


def joint_attributes(*tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Edited tokens (n, D) and their attributes (K, n, D), for `debias`, of one factor or of several at once.

    tokens: for each factor (K_f, n_f, D), of its n_f concepts at each of its values, as `factor_tokens` gives them.
    Edited are all of them. K is the product of the K_f, the last factor varying fastest.
    """
    if not tokens or not all(isinstance(t, Tensor) and t.ndim == 3 for t in tokens):
        given = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in tokens]
        raise InputError(f"tokens are {given}, must be one torch.Tensor (K, n, D) after another, one for each factor")
    places = torch.cartesian_prod(*(torch.arange(len(t)) for t in tokens)).reshape(-1, len(tokens))  # (K, factors)
    own = [t[at].repeat(1, len(t), 1) for t, at in zip(tokens, places.T, strict=True)]
    return torch.cat([t.flatten(0, 1) for t in tokens]), torch.cat(own, dim=1)


def _moved(edited: Tensor, attributes: Tensor, by: Tensor) -> Values:
    """v* (n, inner) of a weight: W c + sum_j by_j |W c| u_j / |u_j|."""

    def values(weight: Tensor) -> Tensor:
        own = edited.to(weight).reshape(-1, weight.shape[1]) @ weight.T
        towards = attributes.to(weight) @ weight.T  # u (K, n, inner)
        unit = towards / towards.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        return own + own.norm(dim=1, keepdim=True) * torch.einsum("k,kni->ni", by.to(weight), unit)

    return values


def _measured(model: Any, edit: Edit, shares: Shares, count: int) -> list[float]:
    edit.apply(model)
    try:
        given = shares(model)
    finally:
        edit.undo(model)
    try:
        values = torch.as_tensor(given, dtype=torch.float64).flatten()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if len(values) != count or not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"shares gave {str(given)[:80]}, must give {count} numbers in 0..1, one for each attribute")
    return values.tolist()


def _attributes(attributes: Tensor, edited: int) -> Tensor:
    """(K, n, D)."""
    if not isinstance(attributes, Tensor) or attributes.ndim not in (2, 3) or len(attributes) < 2:
        given = tuple(attributes.shape) if isinstance(attributes, Tensor) else type(attributes).__name__
        raise InputError(f"attributes are {given}, must be tokens (K, D) or (K, n, D), K at least 2")
    tokens = attributes[:, None].expand(-1, edited, -1) if attributes.ndim == 2 else attributes
    if tokens.shape[1] != edited or not tokens.isfinite().all():
        raise InputError(f"attributes are {tuple(attributes.shape)}, must be finite, with {edited} tokens each")
    return tokens
