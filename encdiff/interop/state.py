"""What the patched blocks of one U-Net share: a prompt's keys and values, maps, T-GATE."""

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from encdiff.errors import InputError
from encdiff.ops._dispatch import is_transformed
from encdiff.ops._triton import autocast_dtype


class Recorder(Protocol):
    """What takes maps: `interop.maps.Maps`."""

    def take(self, name: str, attention: Tensor) -> None: ...


class Projected(NamedTuple):
    """Keys and values, and what they were made from."""

    context: weakref.ref
    state: tuple
    keys_values: tuple[Tensor, Tensor]


@dataclass
class Patch:
    """Of a patched U-Net."""

    self_attention: bool = False
    impl: str | None = None
    modes: dict[str, str] = field(default_factory=lambda: {"attn1": "compute", "attn2": "compute"})
    kept: dict[str, Tensor] = field(default_factory=dict)  # outputs of attentions, for T-GATE
    guided: bool = False  # what is kept is the mean of the two halves of a guided batch
    maps: list[tuple[dict[str, str], Recorder]] = field(default_factory=list)  # who records which, by which names
    users: list[str] = field(default_factory=list)  # the blocks of `record_maps` and `tgate` that are open
    tokens: dict[str, Projected] = field(default_factory=dict)
    served: dict[str, tuple[tuple, bool]] = field(default_factory=dict)  # by our ops? and the fingerprint of then

    def keep(self, name: str, y: Tensor) -> None:
        halves = self.guided and name.endswith("attn2")
        self.kept[name] = y.unflatten(0, (2, -1)).mean(0) if halves else y

    def recall(self, name: str, x: Tensor) -> Tensor:
        y = self.kept.get(name)
        if y is None or y.shape != x.shape:
            kept = "nothing" if y is None else f"features {tuple(y.shape)}"
            raise InputError(
                f"{name} is given features {tuple(x.shape)}, and kept {kept} for T-GATE to repeat; batch, size and "
                "layers must stay the same during a sampling"
            )
        return y

    def projected(self, name: str, attn: Any, context: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of a prompt, computed once while it is the same tensor; None: the op makes them.

        The same means the same object, in no way written to since, under the same weights. Where that cannot be known
        (inference tensors) or would be frozen into a graph, and where gradients are wanted, they are made anew.
        """
        sources = context, attn.to_k.weight, attn.to_v.weight
        if torch.is_grad_enabled():
            self.tokens.pop(name, None)  # who trains may write to weights behind PyTorch's back
            return None
        if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
            return None
        if is_transformed(context) or (context.is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        state = (*((t.data_ptr(), t._version, t.dtype) for t in sources), autocast_dtype(context))
        known = self.tokens.get(name)
        if known is None or known.context() is not context or known.state != state:
            k, v = F.linear(context, attn.to_k.weight), F.linear(context, attn.to_v.weight)
            gone = weakref.ref(context, lambda _: self.tokens.pop(name, None))  # their memory goes with the prompt
            self.tokens[name] = known = Projected(gone, state, (k, v))
        return known.keys_values

    def compute_all(self) -> None:
        """The end of T-GATE: nothing is repeated, nothing kept."""
        self.modes, self.kept, self.guided = dict.fromkeys(self.modes, "compute"), {}, False

    def __getstate__(self) -> dict[str, Any]:
        """A copy begins anew: nothing kept, nothing recorded, nobody's."""
        fresh = Patch(self.self_attention, self.impl)
        return vars(fresh)


def features_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a U-Net is called with: first, or by the name that libraries give it."""
    named = [kwargs[name] for name in ("sample", "x", "hidden_states") if name in kwargs]
    return [*args, *named, *kwargs.values()][0]


def prompt_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a U-Net attends to: third, after the timestep, or by name."""
    named = [kwargs[name] for name in ("encoder_hidden_states", "context") if name in kwargs]
    return [*named, *args[2:], None][0]
