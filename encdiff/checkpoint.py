"""Tensor files: written atomically, read without unpickling, and the published checkpoints' layout."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from encdiff.errors import InputError

UNET = "model.diffusion_model."
EMA = "model_ema."


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` that replaces it when the block succeeds and vanishes when it does not."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the old one stays until the new one is complete."""
    with atomic_path(path) as temporary:
        try:
            save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, temporary, metadata)
        except SafetensorError as error:  # how the library reports a full disk
            raise OSError(f"{path}: could not be written: {error}") from None


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata. Raises InputError if it is not one or is truncated."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again or train anew") from None


def load_state(module: torch.nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """`load_state_dict` that names the file and every missing, unexpected or misshapen tensor in its error."""
    own = module.state_dict()
    problems = {
        "missing": [k for k in own if k not in state],
        "unexpected": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own
            if k in state and state[k].shape != own[k].shape
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names)
        raise InputError(f"{source}: does not fit this configuration: {said}")
    module.load_state_dict(state)


def read_published(path: str | Path, ema: bool, trusted: bool) -> tuple[dict[str, Tensor], float]:
    """The tensors of a published checkpoint under the names of `EncDiff.state_dict()`, and its scaling factor.

    With `ema`, the averaged copy of the U-Net replaces the trained one. Schedule buffers are left out.
    """
    state = _unpickle(path, trusted)
    averaged = {k.removeprefix(EMA): v for k, v in state.items() if k.startswith(EMA)}
    kept = {k: v for k, v in state.items() if k.startswith((UNET, "cond_stage_model.", "first_stage_model."))}
    if ema:
        lost = [k for k in kept if k.startswith(UNET) and _ema_name(k) not in averaged]
        if lost:
            raise InputError(f"{path}: no EMA copy of {_few(lost)}; load it with ema=False")
        kept |= {k: averaged[_ema_name(k)] for k in kept if k.startswith(UNET)}
    kept = {k: v for k, v in kept.items() if not k.startswith("first_stage_model.loss.")}
    return kept, float(state.get("scale_factor", 1.0))


def write_published(path: str | Path, state: dict[str, Tensor], scaling_factor: float) -> None:
    """Write a checkpoint that the published code's `init_from_ckpt` reads; its EMA copy is the U-Net itself."""
    state = {k: v.detach().clone() for k, v in state.items()}
    state |= {EMA + _ema_name(k): v for k, v in state.items() if k.startswith(UNET)}
    state |= {EMA + "decay": torch.tensor(0.9999), EMA + "num_updates": torch.tensor(0, dtype=torch.int32)}
    state["scale_factor"] = torch.tensor(scaling_factor)
    with atomic_path(path) as temporary:
        torch.save({"state_dict": state}, temporary)


def _ema_name(name: str) -> str:
    return name.removeprefix("model.").replace(".", "")


def _unpickle(path: str | Path, trusted: bool) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=not trusted)
    except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, EOFError, ... by kind of damage
        remedy = "" if trusted else "; if it is whole and you trust its origin, load it with trusted=True"
        raise InputError(f"{path}: not a checkpoint of tensors ({str(error).splitlines()[0]}){remedy}") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not all(isinstance(k, str) for k in content):
        raise InputError(f"{path}: holds no state_dict")
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def _few(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
