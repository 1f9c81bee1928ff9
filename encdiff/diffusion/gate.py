"""T-GATE: which attentions of a U-Net are computed at which of its evaluations, and which repeat what they gave."""

from dataclasses import dataclass
from typing import Literal

from encdiff.checked import Checked, Count
from encdiff.errors import InputError

Mode = Literal["compute", "keep", "reuse"]  # "keep": compute, and keep the output for those who reuse it


@dataclass(frozen=True)
class TGate(Checked):
    """From evaluation `gate` on, cross-attentions repeat what they gave there; before it, self-attentions are spared.

    The first `self_warmup` evaluations compute every self-attention; then, up to the gate, each `self_every`th does and
    the others repeat it; after the gate all are computed. `self_every` 1 never repeats a self-attention. An evaluation
    is one call of the U-Net; they are counted from 1.

    Source: arXiv 2404.02747, whose figures are gate 10 of 25, warm-up 2, every 5th.
    """

    gate: Count
    self_warmup: Count = 2
    self_every: Count = 5

    def check(self, evaluations: int) -> None:
        """Raise InputError unless the gate lies among so many evaluations."""
        if self.gate > evaluations:
            raise InputError(f"gate is {self.gate}, must lie in 1 to {evaluations}, the evaluations of the U-Net")

    def cross(self, i: int) -> Mode:
        """Of cross-attentions in evaluation i = 1, 2, .."""
        return "compute" if i < self.gate else "keep" if i == self.gate else "reuse"

    def own(self, i: int) -> Mode:
        """Of self-attentions in evaluation i = 1, 2, .."""
        if self.self_every == 1 or i <= self.self_warmup or i > self.gate:
            return "compute"
        return "keep" if i == self.self_warmup + 1 or (i - 1) % self.self_every == 0 else "reuse"


Gate = int | TGate | None


def as_tgate(gate: Gate) -> TGate | None:
    """A number gates cross-attentions alone."""
    return gate if gate is None or isinstance(gate, TGate) else TGate(gate, self_every=1)
