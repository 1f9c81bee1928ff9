"""Tensor files: written atomically, read without unpickling, and the published checkpoints' layout."""

import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from encdiff import pretrained
from encdiff.errors import InputError
from encdiff.files.reading import read_json, refuse_special, whole_number
from encdiff.files.temporaries import atomic_path, disk_errors

M = TypeVar("M", bound=torch.nn.Module)
ATTEMPTS = 20  # to read two files that belong together

UNET = "model.diffusion_model."
EMA = "model_ema."


def save_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; the old one stays until the new one is complete."""
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows; safetensors would leave it to the owner alone
        with disk_errors(SafetensorError):
            save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)


def load_tensors(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors and its metadata. Raises InputError if it is not one or is truncated."""
    with _open_tensors(path, str(device)) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def tensor_shapes(path: str | Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """As `load_tensors`, of the tensors their shapes only, which the file's beginning tells."""
    with _open_tensors(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _open_tensors(path: str | Path, device: str = "cpu") -> Iterator[Any]:
    is_there(path)
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (SafetensorError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # or a dtype torch lacks
        raise InputError(f"{path}: not a whole safetensors file ({error}); copy it again or train anew") from None


def is_there(path: str | Path) -> None:
    """InputError unless `path` is a file."""
    if Path(path).exists():
        refuse_special(path)
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")


def step_of(metadata: Mapping[str, str], source: str | Path) -> int:
    """The step that a training's checkpoint names; InputError, naming `source`, without one."""
    step = whole_number(metadata.get("step"))
    if step is None:
        raise InputError(f"{source}: names no step; is it a checkpoint of a training run?")
    return step


def positive_number(value: Any, name: str, source: str | Path) -> float:
    """A finite number above 0 out of a text or a tensor of one element; InputError for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        number = math.nan
    if not 1e-30 <= number <= 1e30:
        raise InputError(f"{source}: {name} is {str(value)[:80]}, must be a number above 0")
    return number


def build_fitting(build: Callable[[], M], shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> M:
    """The module that `build` makes, made only once one without memory has shown that the shapes fit it."""
    with torch.device("meta"):
        own = build().state_dict()
    _refuse_others(own, shapes, source)
    return build()


def save_model(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """`model.safetensors` and `config.json`, each whole or not at all; the first says which of the second it is of."""
    save_tensors(folder / "model.safetensors", state, {"format": "pt", "config": fingerprint(config)})
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def fingerprint(config: dict[str, Any]) -> str:
    """Of a configuration as its file has it."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def load_model(build: Callable[[Any], M], config: str | Path, weights: str | Path) -> M:
    """The module that `build` makes of the JSON `config`, filled from `weights`, which must be of that configuration.

    Weights are compared before anything large is built. A folder that is being written meanwhile is read again.
    """
    for attempt in range(ATTEMPTS):
        values = read_json(config)
        shapes, metadata = tensor_shapes(weights)
        if metadata.get("config", fingerprint(values)) == fingerprint(values):
            break
        time.sleep(0.05 * (attempt < ATTEMPTS - 1))
    try:
        with torch.device("meta"):
            own = build(values).state_dict()
    except InputError as error:  # layers know no file
        raise error if str(error).startswith(str(config)) else InputError(f"{config}: {error}") from None
    _refuse_others(own, shapes, weights)
    if metadata.get("config", fingerprint(values)) != fingerprint(values):
        raise InputError(f"{weights}: of another configuration than {config}; both must be of one save_pretrained")
    model = build(values)
    tensors, now = load_tensors(weights)
    if now != metadata:
        raise InputError(f"{weights}: was replaced while it was read; read it again")
    load_state(model, tensors, weights)
    return model


def load_state(module: torch.nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """`load_state_dict` that names the file and every missing, unexpected or misshapen tensor in its error.

    Tensors of another kind (integers for floats, ...) and values that are not finite are refused, too.
    """
    own = module.state_dict()
    _refuse_others(own, {k: tuple(v.shape) for k, v in state.items()}, source)
    for name, tensor in state.items():
        kinds = [(t.is_floating_point(), None if t.is_floating_point() else t.dtype) for t in (tensor, own[name])]
        if kinds[0] != kinds[1]:
            raise InputError(f"{source}: {name} is {tensor.dtype}, must be {own[name].dtype}")
        if not tensor.to(own[name].dtype).isfinite().all() or (name.endswith("running_var") and (tensor < 0).any()):
            raise InputError(f"{source}: {name} holds NaN, infinite or impossible numbers; copy it again or train anew")
    module.load_state_dict(state)


def _refuse_others(own: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], source: str | Path) -> None:
    problems = {
        "missing": [k for k in own if k not in shapes],
        "unexpected": [k for k in shapes if k not in own],
        "of another shape": [
            f"{k} {shapes[k]} instead of {tuple(own[k].shape)}"
            for k in own
            if k in shapes and shapes[k] != tuple(own[k].shape)
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{len(names)} {kind}: {_few(names)}" for kind, names in problems.items() if names)
        raise InputError(f"{source}: does not fit this configuration: {said}")


def locate(name: str | Path, file: str, hub: dict[str, Any], kind: str | None = None) -> Path:
    """A file of a model: `name` is a folder, a model that comes with the package, or one on the Hub, in this order.

    Errors offer the package's models of a `kind` (`pretrained.names`).
    """
    for folder in (Path(name), pretrained.FOLDER / name):
        if folder.is_dir():
            if not (folder / file).is_file():
                model = f", such as {folder / 'model'}" if (folder / "model" / file).is_file() else ""
                raise InputError(f"{folder}: no {file} in it; must be a folder written by save_pretrained{model}")
            return folder / file
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", str(name)):  # no OWNER/NAME of the Hub's: do not wait for a network
        packaged = ", ".join(pretrained.names(kind)) or "none"
        raise InputError(
            f"{name}: no such folder; must be one, a model of the package ({packaged}) or the Hub's OWNER/NAME"
        )
    try:
        return Path(hf_hub_download(str(name), file, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{name}: neither a folder here nor a model that the Hub gave ({reason})") from None


def read_published(path: str | Path, ema: bool) -> tuple[dict[str, Tensor], float]:
    """The tensors of a published checkpoint under the names of `EncDiff.state_dict()`, and its scaling factor.

    With `ema`, the averaged copy of the U-Net replaces the trained one. Schedule buffers and the first stage's losses
    are left out.
    """
    state = _load_tensors_only(path)
    averaged = {k.removeprefix(EMA): v for k, v in state.items() if k.startswith(EMA)}
    own = (UNET, "cond_stage_model.", "first_stage_model.")
    kept = {k: v for k, v in state.items() if k.startswith(own) and not k.startswith("first_stage_model.loss.")}
    if not kept:
        raise InputError(f"{path}: holds no tensor of {', '.join(own)}; must be a checkpoint of the published code")
    if ema:
        lost = [k for k in kept if k.startswith(UNET) and _ema_name(k) not in averaged]
        if lost:
            raise InputError(f"{path}: no EMA copy of {_few(lost)}; load it with ema=False")
        kept |= {k: averaged[_ema_name(k)] for k in kept if k.startswith(UNET)}
    for name, tensor in kept.items():
        if _unusual(tensor):
            raise InputError(f"{path}: {name} is {_unusual(tensor)}, must be a plain tensor of numbers")
    return kept, positive_number(state.get("scale_factor", 1.0), "scale_factor", path)


def _unusual(tensor: Tensor) -> str:
    """What keeps a tensor from being plain memory full of real numbers."""
    kinds = {
        "nested": tensor.is_nested, "sparse": tensor.layout != torch.strided, "quantized": tensor.is_quantized,
        "on meta, without values": tensor.is_meta, "complex": tensor.is_complex(),
    }  # fmt: skip
    return next((kind for kind, found in kinds.items() if found), "")


def write_published(path: str | Path, state: dict[str, Tensor], scaling_factor: float) -> None:
    """Write a checkpoint that the published code's `init_from_ckpt` reads; its EMA copy is the U-Net itself."""
    state = {k: v.detach().clone() for k, v in state.items()}
    state |= {EMA + _ema_name(k): v for k, v in state.items() if k.startswith(UNET)}
    state |= {EMA + "decay": torch.tensor(0.9999), EMA + "num_updates": torch.tensor(0, dtype=torch.int32)}
    state["scale_factor"] = torch.tensor(scaling_factor)
    with atomic_path(path) as temporary, disk_errors(RuntimeError):
        torch.save({"state_dict": state}, temporary)


def _ema_name(name: str) -> str:
    return name.removeprefix("model.").replace(".", "")


def _load_tensors_only(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a `torch.save` file, read with `weights_only`.

    Lightning's files also hold objects of its own classes; they are read as inert placeholders, so that no code of
    theirs runs.
    """
    is_there(path)
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert: list[Any] = [(type(re.sub(r"\W", "_", name), (_Inert,), {}), name) for name in names]
        with torch.serialization.safe_globals(inert):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises UnpicklingError, RuntimeError, EOFError, ... by kind of damage
        kind = type(error).__name__
        raise InputError(f"{path}: not a whole checkpoint of torch.save, version 1.6 or newer ({kind})") from None
    content = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no state_dict")
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}


class _Inert:
    """Stands for an object of a class that is not trusted: takes anything, does nothing."""

    def __new__(cls, *_args, **_kwargs) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_args, **_kwargs) -> None: ...

    def __setstate__(self, _state) -> None: ...


def _few(names: list[str], most: int = 8) -> str:
    names = [name[:200] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
