"""The least-squares problem that MIST and UCE share, and its solution."""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from encdiff.errors import InputError

Scale = float | Sequence[float] | Tensor  # one number, or one for each token
ALIKE = 1e-9  # of 1 - |cosine|: tokens nearer to each other than this are collinear
SINGULAR = 1e-13  # of the system's least to its greatest eigenvalue


class Update(NamedTuple):
    """What every weight W (inner, D) of tokens c_i (n, D) shares: W' = W + (v* - W c)^T gain, all float64."""

    edited: Tensor  # c (n, D)
    gain: Tensor  # (n, D), diag(e) c M^-1

    def __call__(self, weight: Tensor, wanted: Tensor) -> Tensor:
        """W' (inner, D), float64, of a weight (inner, D) and the values v* (n, inner) that the tokens should have."""
        weight, wanted = weight.detach().double(), wanted.detach().double()
        shape = len(self.edited), len(weight)
        if weight.shape[1:] != self.edited.shape[1:] or wanted.shape != shape or not wanted.isfinite().all():
            raise InputError(
                f"wanted is {tuple(wanted.shape)} for a weight {tuple(weight.shape)}, must be finite numbers {shape}"
            )
        return weight + (wanted - self.edited @ weight.T).T @ self.gain


def update(
    edited: Tensor,
    kept: Tensor | None = None,
    *,
    lam: float = 0.5,
    edit_scale: Scale = 1.0,
    keep_scale: Scale = 0.2,
    names: Sequence[str] | None = None,
) -> Update:
    """The part of `solve` that does not depend on the weight, for all layers of a model; see there."""
    c = check_tokens(edited, "edited")
    kept = c[:0] if kept is None else check_tokens(kept, "keep", len(c[0]))
    if not isinstance(lam, Real) or not 0 <= lam <= 1e30:
        raise InputError(f"lam is {lam!r:.80}, must be a number, at least 0")
    e, p = _scale(edit_scale, len(c), "edit_scale"), _scale(keep_scale, len(kept), "keep_scale")
    system = lam * torch.eye(c.shape[1], dtype=torch.float64, device=c.device)
    system += (c.T * e) @ c + (kept.T * p) @ kept
    _check_regular(system, lam, torch.cat([c, kept]), _names(names, len(c), len(kept)))
    return Update(c, torch.linalg.solve(system, c.T * e).T)


def solve(
    weight: Tensor,
    edited: Tensor,
    wanted: Tensor,
    kept: Tensor | None = None,
    *,
    lam: float = 0.5,
    edit_scale: Scale = 1.0,
    keep_scale: Scale = 0.2,
) -> Tensor:
    """The weight W' that gives edited tokens the wanted values and leaves the others as they are, by least squares.

    It is the minimum of sum_i e_i |W' c_i - v*_i|^2 + sum_r p_r |W' c_r - W c_r|^2 + lam |W' - W|^2, which is
    W' = (lam W + sum_i e_i v*_i c_i^T + sum_r p_r W c_r c_r^T) M^-1 with M = lam I + sum_i e_i c_i c_i^T +
    sum_r p_r c_r c_r^T; computed as W + sum_i e_i (v*_i - W c_i) c_i^T M^-1.

    Args:
        weight: W (inner, D), of any floating dtype.
        edited: tokens c (n, D).
        wanted: their values v* (n, inner).
        kept: tokens c_r (m, D); None: none.
        lam: how much every change of the weight costs.
        edit_scale, keep_scale: e and p, a number or one for each token.

    Returns:
        W' (inner, D), float64.

    Raises:
        InputError: shapes that do not fit, numbers that are not finite, a system that is singular, collinear tokens
            that want different values; the last two name the tokens.

    Source: arXiv 2403.19738, 2308.14761.
    """
    found = update(edited, kept, lam=lam, edit_scale=edit_scale, keep_scale=keep_scale)
    kept = found.edited[:0] if kept is None else check_tokens(kept, "keep")
    changed = found(weight, wanted)
    check_consistent(found.edited, wanted.double(), kept, kept @ weight.double().T)
    return changed


def check_tokens(tokens: Tensor, name: str, width: int | None = None) -> Tensor:
    """Tokens (n, D) as float64; one (D,) is made (1, D)."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(f"{name} are {kind}, must be a torch.Tensor of floats (n, D), tokens or prompt embeddings")
    rows = tokens.detach().double()
    rows = rows[None] if rows.ndim == 1 else rows
    said, wanted = f"{name} are {tuple(tokens.shape)}", f"must be finite tokens (n, {width or 'D'})"
    if rows.ndim == 3:
        raise InputError(f"{said}, {wanted}: of prompt embeddings end_of_text picks one each, flatten(0, 1) takes all")
    if rows.ndim != 2 or not rows.numel() or width not in (None, rows.shape[1]):
        raise InputError(f"{said}, {wanted}")
    if not rows.isfinite().all():
        raise InputError(f"{said}, {int((~rows.isfinite()).sum())} of their numbers NaN or infinite, {wanted}")
    return rows


def check_consistent(
    edited: Tensor, wanted: Tensor, kept: Tensor, values: Tensor, names: Sequence[str] | None = None
) -> None:
    """InputError for an edited token that is a multiple of another token, edited or kept, but wants another value.

    edited (n, D) want (n, inner), kept (m, D) have `values` (m, inner).
    """
    labels = _names(names, len(edited), len(kept))
    tokens, targets = torch.cat([edited, kept]), torch.cat([wanted, values])
    for i, j in collinear_pairs(tokens, len(edited)):
        times = (tokens[i] @ tokens[j]) / tokens[i].square().sum()  # tokens[j] = times tokens[i]
        if not torch.allclose(targets[j], times * targets[i], rtol=1e-6, atol=1e-6 * float(targets[j].norm())):
            raise InputError(
                f"{labels[i]} and {labels[j]} are collinear, but should have different values, which no weight gives "
                "both; leave one out"
            )


def collinear_pairs(tokens: Tensor, first: int) -> list[tuple[int, int]]:
    """Pairs i < j of the tokens (n, D), i among the first ones, of which one is a multiple of the other."""
    unit = tokens / tokens.norm(dim=1, keepdim=True).clamp(min=1e-300)
    found = (1 - (unit[:first] @ unit.T).abs() < ALIKE).nonzero().tolist()
    return [(i, j) for i, j in found if i < j]


def _scale(scale: Scale, count: int, name: str) -> Tensor:
    try:
        values = torch.as_tensor(scale, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if values.shape not in ((), (count,)) or not (values >= 0).all() or not values.isfinite().all():
        raise InputError(f"{name} is {str(scale)[:80]}, must be a number, at least 0, or {count}, one for each token")
    return values.expand(count)


def _names(names: Sequence[str] | None, edited: int, kept: int) -> list[str]:
    """What tokens are called in errors: by the names of the edited ones and then of those to keep, or by index."""
    if names is None:
        return [f"edited {i}" for i in range(edited)] + [f"keep {i}" for i in range(kept)]
    if len(names) != edited + kept:
        raise InputError(
            f"names are {len(names)}, must be {edited + kept}: of the edited tokens, then of those to keep"
        )
    return [repr(name) for name in names]


def _check_regular(system: Tensor, lam: float, tokens: Tensor, names: list[str]) -> None:
    """InputError, with the collinear tokens, where the system has no one solution."""
    if lam > SINGULAR * float(system.diagonal().sum()):
        return
    values = torch.linalg.eigvalsh(system)
    if values[0] > SINGULAR * values[-1]:
        return
    pairs = collinear_pairs(tokens, len(tokens))
    told = "; ".join(f"{names[i]} and {names[j]} are collinear" for i, j in pairs[:4])
    rank = int((values > SINGULAR * values[-1]).sum())
    raise InputError(
        f"lam is {lam}, and {', '.join(names[:4])}{', ...' if len(names) > 4 else ''} span {rank} of "
        f"{len(system)} dimensions{f' ({told})' if told else ''}: the system is singular; lam must be above 0"
    )
