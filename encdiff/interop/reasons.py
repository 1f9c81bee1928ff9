"""Why an attention of another library stays as it is: what our ops do not compute, or would pass by."""

from typing import Any

from torch import nn

# Their result is the plain formula; slices are a matter of memory, which a fused kernel does not need.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor")
# What diffusers' Attention may have beyond the formula, and how it is when it has not.
EXTRAS: dict[str, Any] = {
    "spatial_norm": None, "group_norm": None, "norm_cross": None, "norm_q": None, "norm_k": None,
    "add_k_proj": None, "residual_connection": False, "rescale_output_factor": 1.0, "is_causal": False,
}  # fmt: skip


def attention_reasons(attn: Any, norm: Any) -> list[str]:
    """Why `attn`, with the LayerNorm before it, stays with its library; empty: our op computes the same."""
    if wrapped := _not_linear(attn):
        kinds = {f"{type(getattr(attn, name)).__module__}.{type(getattr(attn, name)).__name__}" for name in wrapped}
        return [f"{', '.join(wrapped)}: {', '.join(sorted(kinds))}, not a plain torch Linear"]
    reasons = []
    processor = type(getattr(attn, "processor", None)).__name__
    if hasattr(attn, "processor") and processor not in PLAIN_PROCESSORS:
        reasons.append(f"its processor is {processor}")
    reasons += [f"it has {name}" for name, without in EXTRAS.items() if getattr(attn, name, without) != without]
    if any(getattr(attn, name).bias is not None for name in ("to_q", "to_k", "to_v")):
        reasons.append("its queries, keys or values have a bias")
    inner = len(attn.to_q.weight)
    if len(attn.to_k.weight) != inner or len(attn.to_v.weight) != inner or inner % attn.heads:
        reasons.append(f"keys and values of {len(attn.to_k.weight)} columns do not go with {inner} of the queries")
    elif abs(getattr(attn, "scale", (width := inner // attn.heads) ** -0.5) * width**0.5 - 1) > 1e-6:
        reasons.append(f"it scales logits by {attn.scale}")
    if attn.training and any(isinstance(layer, nn.Dropout) and layer.p for layer in attn.to_out):
        reasons.append("it drops out in training")
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        reasons.append(f"its norm is {norm}, not a LayerNorm with weight and bias")
    if any(_is_hooked(module) for module in _layers(attn, norm)):
        reasons.append("a hook on it, or on a layer of it, would be passed by (offloading and casting use such)")
    return reasons


def fingerprint(attn: Any, norm: Any) -> tuple:
    """What of these reasons changes while a model is in use: LoRA, adapters, hooks, mode; 5 us to look at, not 50."""
    return attn.training, type(vars(attn).get("processor")), *(
        (type(module), _is_hooked(module)) for module in _layers(attn, norm)
    )  # fmt: skip


def _layers(attn: Any, norm: Any) -> list[nn.Module]:
    parts = attn._modules  # by getattr it takes three times as long
    return [attn, norm, *(parts[name] for name in ("to_q", "to_k", "to_v")), parts["to_out"]._modules.get("0", attn)]


def _is_hooked(module: nn.Module) -> bool:
    """Whether something listens to the module's calls, or took the place of its `forward`."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


def _not_linear(attn: Any) -> list[str]:
    """Of the four projections those that LoRA, quantisation or a parametrisation has made something else."""
    names = [name for name in ("to_q", "to_k", "to_v") if type(getattr(attn, name)) is not nn.Linear]
    out = attn.to_out
    return (
        names if isinstance(out, (nn.Sequential, nn.ModuleList)) and type(out[0]) is nn.Linear else [*names, "to_out"]
    )


def block_reasons(block: Any) -> list[str]:
    """Why a whole diffusers block stays as it is."""
    reasons = []
    if block.norm_type != "layer_norm":
        reasons.append(f"its norm_type is {block.norm_type}")
    if getattr(block, "pos_embed", None) is not None:
        reasons.append("it adds positions")
    if hasattr(block, "fuser"):
        reasons.append("it is gated by grounding (GLIGEN)")
    return reasons
