"""Does an edit of projections bring one value of a factor; `python -m bench.concept_edits room64 --images 64`.

For each factor the edit should give every image value 2. Images of other values are drawn by the model as it is and by
the edited one, and read by the nearest of all true images: `wanted` is the share with value 2, `unwanted` the share in
which another factor changed. Before any edit stand the tokens: how many dimensions they fill. Beside the rates, means
over factors: of the way from an edited token to the wanted one, how much is gone, and how far kept tokens move,
relative to their length; and the condition of the system.
"""

import argparse
from typing import NamedTuple

import numpy as np
import torch

from encdiff import EncDiff, open_dataset
from encdiff.data import Dataset
from encdiff.edit import Targets, factor_concepts, factor_targets, known_codes
from encdiff.edit.closed_form import update
from encdiff.edit.methods import edit_by
from encdiff.evaluation import edit_effect
from encdiff.evaluation.judge import judge_of

VALUE = 2  # that every image should get


class Variant(NamedTuple):
    """How an edit is made: method, lam, p, and which tokens are kept."""

    method: str
    lam: float = 0.5
    keep_scale: float = 0.2
    kept: str = "range"


VARIANTS = {
    "MIST": Variant("mist"),
    "MIST, p 0.05": Variant("mist", keep_scale=0.05),
    "UCE": Variant("uce"),
    "UCE, p 0.05": Variant("uce", keep_scale=0.05),
    "UCE, p 1": Variant("uce", keep_scale=1),
    "UCE, lam 50": Variant("uce", lam=50),
    "UCE, keep means": Variant("uce", kept="means"),
    "UCE, keep images": Variant("uce", kept="images"),
    "UCE, keep none": Variant("uce", kept="none"),
}


def kept_tokens(
    model: EncDiff, codes: torch.Tensor, owned: list[int], range_: torch.Tensor, kept: str
) -> tuple[torch.Tensor | None, float]:
    """The tokens to keep, and what p is multiplied with so that all of them together weigh as much as by default."""
    if kept == "range":
        return range_, 1.0
    if kept == "none":
        return None, 1.0
    others = [c for c in range(model.config.concepts) if c not in owned]
    with torch.no_grad():
        tokens = model.tokens(codes.mean(0, keepdim=True) if kept == "means" else codes[:200])[:, others].flatten(0, 1)
    return tokens, len(range_) / len(tokens)


def tell_tokens(model: EncDiff, codes: torch.Tensor) -> None:
    with torch.no_grad():
        tokens = model.tokens(codes).double()  # (n, N, D)
    values = torch.linalg.svdvals(tokens.flatten(0, 1))
    share = [torch.linalg.svdvals(own - own.mean(0)).square() for own in tokens.unbind(1)]
    along = [float(s[0] / s.sum()) for s in share]
    print(f"{tokens.shape[1]} concepts' tokens in {tokens.shape[2]} dimensions: singular values of all", end=" ")
    print(f"{values[0] / values[-1]:.1f} : 1, effective rank {effective_rank(values):.1f};")
    print(f"of one concept's variance {np.median(along):.2f} lies along one line (median; {min(along):.2f} at least)\n")


def effective_rank(values: torch.Tensor) -> float:
    """exp of the entropy of the shares of variance."""
    share = values.square() / values.square().sum()
    return float(torch.exp(-(share * share.log()).sum()))


def moved_scalars(
    model: EncDiff, room: Dataset, column: int, owned: list[int], known: tuple[torch.Tensor, np.ndarray], given
) -> tuple[float, float]:
    """The same rates where the concepts' scalars are set to their means over images of this value, without any edit."""
    judge = judge_of(model, room, None, None, steps=given.steps)
    every = room.factors(np.arange(len(room)))
    rows = np.random.default_rng(0).choice(np.flatnonzero(every[:, column] != VALUE), given.images, replace=False)
    changed, (codes, factors) = judge.encode(rows), known
    changed[:, owned] = codes[torch.from_numpy(factors[:, column] == VALUE)].mean(0)[owned]
    read, true = judge.read(judge.draw(changed)), every[rows]
    return float((read[:, column] == VALUE).mean()), float(np.delete(read != true, column, 1).any(1).mean())


def main(arguments: list[str] | None = None) -> None:
    """A row for each variant, and in it for each factor per cent wanted / unwanted."""
    parser = argparse.ArgumentParser(prog="python -m bench.concept_edits", description=__doc__)
    parser.add_argument("model", nargs="?", default="room64")
    parser.add_argument("--data", default="procedural:5,5,5,4,4,5")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--variants", default=";".join(VARIANTS), help="names, with ; between them")
    given = parser.parse_args(arguments)
    model = EncDiff.from_pretrained(given.model)
    room = open_dataset(given.data, model.config.image_size)
    known = known_codes(model, room)
    tell_tokens(model, known[0])
    factors = [name.replace("_", " ") for name in room.factor_names]
    targets = {factor: factor_targets(model, room, factor, VALUE) for factor in factors}
    print(f"| | {' | '.join(factors)} | mean | gone | kept move | condition |\n|---|{'---|' * (len(factors) + 4)}")
    owned = {factor: factor_concepts(model, room, factor) for factor in factors}
    tell("scalars set", [moved_scalars(model, room, i, owned[f], known, given) for i, f in enumerate(factors)])
    for name in given.variants.split(";"):
        variant, rates, solved = VARIANTS[name], [], []
        for factor in factors:
            own = targets[factor]
            kept, times = kept_tokens(model, known[0], owned[factor], own.keep, variant.kept)
            p = variant.keep_scale * times
            edit = edit_by(
                variant.method, model, own.edited, own.wanted, kept, name=factor, lam=variant.lam, keep_scale=p
            )
            solved.append(told_of(own, kept, variant.lam, p))
            effect = edit_effect(model, edit, room, factor, VALUE, images=given.images, steps=given.steps)
            rates.append((effect["after"]["wanted"], effect["after"]["unwanted"]))
        tell(name, rates, *np.mean(solved, axis=0))


def told_of(targets: Targets, kept: torch.Tensor | None, lam: float, p: float) -> tuple[float, float, float]:
    """How far edited tokens come, how far those of the range move, and the system's condition, in token space.

    With keys and values edited alike the edit is one linear map of tokens, the same for every layer.
    """
    edited, wanted, range_ = (tokens.double() for tokens in targets)
    step = (wanted - edited).T @ update(edited, kept, lam=lam, keep_scale=p).gain  # the map less the identity
    left = ((wanted - edited) - edited @ step.T).norm() / (wanted - edited).norm()
    moved = (range_ @ step.T).norm(dim=1) / range_.norm(dim=1)
    rows = edited if kept is None else torch.cat([edited, p**0.5 * kept.double()])
    condition = torch.linalg.cond(lam * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows)
    return 1 - float(left), float(moved.mean()), float(condition)


def tell(name: str, rates: list[tuple[float, float]], *solved: float) -> None:
    cells = [f"{100 * wanted:.0f} / {100 * unwanted:.0f}" for wanted, unwanted in [*rates, np.mean(rates, axis=0)]]
    cells += [f"{number:.2f}" for number in solved[:2]] + [f"{number:.0f}" for number in solved[2:]]
    print(f"| {name} | {' | '.join(cells + [''] * (3 - len(solved)))} |", flush=True)


if __name__ == "__main__":
    main()
