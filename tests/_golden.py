"""The golden numbers: weights and inputs drawn from their names (see tests/golden/README.md)."""

from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """The input tensor of that key, float32, on the default device."""
    return torch.as_tensor(_standard_normal("input:" + key, shape))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The weight tensor of that full checkpoint name, float32, on the default device."""
    n = _standard_normal(name, shape)
    if name.endswith("running_var"):
        n = 1 + 0.1 * np.abs(n)
    elif len(shape) >= 2:
        n = n / np.sqrt(np.prod(shape[1:]))
    elif name.endswith(".weight"):
        n = 1 + 0.1 * n
    else:
        n = 0.1 * n
    return torch.as_tensor(n.astype(np.float32))


def fill(module: nn.Module, prefix: str = "") -> nn.Module:
    """Give every floating tensor of the module's state dict its golden value; eval mode."""
    state = module.state_dict()
    filled = {k: weight(prefix + k, tuple(v.shape)) if v.is_floating_point() else v for k, v in state.items()}
    module.load_state_dict(filled)
    return module.eval()


def relative_error(actual: Tensor, expected: np.ndarray | Tensor) -> float:
    """Norm of the difference over the norm, in float64."""
    expected = torch.as_tensor(expected, device="cpu").double()
    return ((actual.detach().cpu().double() - expected).norm() / expected.norm()).item()


def _standard_normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.RandomState(crc32(key.encode())).standard_normal(shape).astype(np.float32)
