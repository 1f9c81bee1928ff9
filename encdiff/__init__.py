"""EncDiff: disentangled concepts from images by a diffusion model that cross-attends to concept tokens."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["PRESETS", "EncDiff", "EncDiffConfig", "InputError", "SamplingEngine", "doctor", "explain", "use_impl"]

if TYPE_CHECKING:
    from encdiff.engine import SamplingEngine
    from encdiff.errors import InputError
    from encdiff.health import doctor
    from encdiff.models import PRESETS, EncDiff, EncDiffConfig
    from encdiff.ops import explain, use_impl

_HOMES = {
    "PRESETS": "encdiff.models",
    "EncDiff": "encdiff.models",
    "EncDiffConfig": "encdiff.models",
    "InputError": "encdiff.errors",
    "SamplingEngine": "encdiff.engine",
    "doctor": "encdiff.health",
    "explain": "encdiff.ops",
    "use_impl": "encdiff.ops",
}


def __getattr__(name: str):
    """Import public names when they are first asked for: `import encdiff` alone loads neither torch nor a kernel."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'encdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
