"""EncDiff: disentangled concepts from images by a diffusion model that cross-attends to concept tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from encdiff import ops
    from encdiff.data import open_dataset, to_float
    from encdiff.diffusion.gate import TGate
    from encdiff.engine import SamplingEngine
    from encdiff.errors import InputError
    from encdiff.evaluation import evaluate
    from encdiff.health import doctor
    from encdiff.interop.maps import record_maps
    from encdiff.interop.patch import explain, patch, unpatch
    from encdiff.interop.scheduler import EncDiffScheduler as EncDiffScheduler
    from encdiff.interop.tgate import tgate
    from encdiff.models import PRESETS, EncDiff, EncDiffConfig
    from encdiff.ops import use_impl
    from encdiff.training import TrainConfig, train

__all__ = [
    "PRESETS", "EncDiff", "EncDiffConfig", "InputError", "SamplingEngine", "TGate", "TrainConfig", "doctor", "evaluate",
    "explain", "open_dataset", "ops", "patch", "record_maps", "tgate", "to_float", "train", "unpatch", "use_impl",
]  # fmt: skip

_HOMES = {
    "PRESETS": "encdiff.models",
    "EncDiff": "encdiff.models",
    "EncDiffConfig": "encdiff.models",
    "EncDiffScheduler": "encdiff.interop.scheduler",  # not in __all__: `import *` must not need diffusers
    "InputError": "encdiff.errors",
    "SamplingEngine": "encdiff.engine",
    "TGate": "encdiff.diffusion.gate",
    "TrainConfig": "encdiff.training",
    "doctor": "encdiff.health",
    "evaluate": "encdiff.evaluation",
    "explain": "encdiff.interop.patch",
    "open_dataset": "encdiff.data",
    "patch": "encdiff.interop.patch",
    "record_maps": "encdiff.interop.maps",
    "tgate": "encdiff.interop.tgate",
    "to_float": "encdiff.data",
    "train": "encdiff.training",
    "unpatch": "encdiff.interop.patch",
    "use_impl": "encdiff.ops",
}
_ROOMS = (
    "data", "diffusion", "edit", "engine", "evaluation", "experiments", "fields", "interop", "metrics", "models", "ops",
    "pictures", "prior", "training",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import public names when they are first asked for: `import encdiff` alone loads neither torch nor a kernel."""
    if name in _ROOMS:
        return import_module(f"encdiff.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'encdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_HOMES, *_ROOMS, "__version__", "__doc__", "__file__", "__name__", "__path__"])
