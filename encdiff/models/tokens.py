"""The MLP bank: every scalar becomes a concept token by an MLP of its own."""

import torch
import torch.nn as nn
from torch import Tensor

from encdiff import ops


class MLPBank(nn.Module):
    """N separate MLPs from a scalar (or a slice) over the widths to a token, stored stacked and applied at once.

    Args:
        concepts: N.
        token_width: d.
        widths: hidden widths; the paper's are 64, 128.
        activation: between the layers; the paper's is ELU.
        slice_width: m; 1 is the paper's, more make each concept a slice of m numbers.
        shared: one MLP for all concepts, for comparison.
        gain: multiplies the initial weights after the first layer. PyTorch's own start, 1, lets the tokens of two
            images differ by a tenth of what their scalars do; sqrt(6), He's, by six tenths (docs/recipes.md).

    Maps scalars (B, N), or slices (B, N, m) also given side by side (B, N * m), to tokens (B, N, d). In a state dict
    the layers stand apart, as in the published checkpoints: `{concept}.{2 * layer}.weight` (out, in) and `.bias`
    (out,); a shared MLP is concept 0.

    Source: arXiv 2402.09712, section 3.2.
    """

    def __init__(
        self,
        concepts: int = 20,
        token_width: int = 16,
        widths: tuple[int, ...] = (64, 128),
        activation: str = "elu",
        slice_width: int = 1,
        shared: bool = False,
        gain: float = 1.0,
    ):
        super().__init__()
        self.concepts, self.activation = concepts, activation
        chain = (slice_width, *widths, token_width)
        mlps = 1 if shared else concepts
        layers = [[nn.Linear(i, o) for _ in range(mlps)] for i, o in zip(chain, chain[1:], strict=False)]
        weights = [torch.stack([m.weight.data for m in layer]) for layer in layers]
        self.weights = nn.ParameterList([weights[0], *(w * gain for w in weights[1:])])
        self.biases = nn.ParameterList(torch.stack([m.bias.data for m in layer]) for layer in layers)
        self.register_state_dict_post_hook(_unstack)
        self.register_load_state_dict_pre_hook(_stack)

    def forward(self, scalars: Tensor) -> Tensor:
        width = self.weights[0].shape[2]
        if width > 1 and scalars.ndim == 2 and scalars.shape[1] == self.concepts * width:
            scalars = scalars.unflatten(1, (self.concepts, width))
        return ops.mlp_bank(scalars, list(self.weights), list(self.biases), self.activation)


def _unstack(bank: MLPBank, state: dict[str, Tensor], prefix: str, _) -> None:
    for layer in range(len(bank.weights)):
        weight, bias = state.pop(f"{prefix}weights.{layer}"), state.pop(f"{prefix}biases.{layer}")
        for concept in range(len(weight)):
            state[f"{prefix}{concept}.{2 * layer}.weight"] = weight[concept]
            state[f"{prefix}{concept}.{2 * layer}.bias"] = bias[concept]


def _stack(bank: MLPBank, state: dict[str, Tensor], prefix: str, *_) -> None:
    for layer, (weight, bias) in enumerate(zip(bank.weights, bank.biases, strict=True)):
        for stacked, parameter, kind in ((weight, "weights", "weight"), (bias, "biases", "bias")):
            names = [f"{prefix}{concept}.{2 * layer}.{kind}" for concept in range(len(stacked))]
            if all(name in state for name in names):  # otherwise they are reported as missing
                state[f"{prefix}{parameter}.{layer}"] = torch.stack([state.pop(name) for name in names])
