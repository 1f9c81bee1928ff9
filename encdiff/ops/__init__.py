"""The fused ops: one file each, with its reference beside it and the choice of implementation in `_dispatch`.

Import the names below from here; imports kernels (their plans, and Triton code only once it is chosen), files, errors.
"""

from encdiff.ops import _families  # noqa: F401 - what the first use of a kernel is checked by
from encdiff.ops._dispatch import OPS, explain, record_impls, use_impl
from encdiff.ops.adamw import adamw
from encdiff.ops.column_sum import column_sum
from encdiff.ops.cross_attention import cross_attention
from encdiff.ops.geglu import geglu
from encdiff.ops.group_norm import group_norm
from encdiff.ops.layer_norm import layer_norm
from encdiff.ops.linear import conv2d, linear
from encdiff.ops.mlp_bank import mlp_bank
from encdiff.ops.noise import q_sample, step
from encdiff.ops.philox import normal, timesteps, uniform
from encdiff.ops.projection import projection
from encdiff.ops.resample import resample
from encdiff.ops.residual_add import residual_add
from encdiff.ops.self_attention import self_attention

__all__ = [
    "OPS", "adamw", "column_sum", "conv2d", "cross_attention", "explain", "geglu", "group_norm", "layer_norm", "linear",
    "mlp_bank", "normal", "projection", "q_sample", "record_impls", "resample", "residual_add", "self_attention",
    "step", "timesteps", "uniform", "use_impl",
]  # fmt: skip
