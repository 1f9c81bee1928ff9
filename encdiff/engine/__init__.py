"""How steps run: as they are, compiled, or as one CUDA graph (`graph`), which `sampling` makes of a whole sampling.

Import the names below from here; imports models and what lies below them.
"""

from encdiff.engine.graph import ENGINES, Graph, choose
from encdiff.engine.precision import float32_precision
from encdiff.engine.sampling import SamplingEngine

__all__ = ["ENGINES", "Graph", "SamplingEngine", "choose", "float32_precision"]
