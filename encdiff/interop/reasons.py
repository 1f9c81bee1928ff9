"""Why an attention of another library stays as it is: what our ops do not compute, or would pass by."""

from typing import Any

from torch import nn

# Of diffusers: their result is the plain formula; slices are a matter of memory, which a fused kernel does not need.
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor")
PROJECTIONS = ("to_q", "to_k", "to_v")
PARTS = (*PROJECTIONS, "to_out", "processor")  # of a plain attention
# What diffusers' Attention may do beyond the formula, and how that is when it does not.
EXTRAS = {"residual_connection": False, "rescale_output_factor": 1.0, "is_causal": False}


def attention_reasons(attn: Any, norm: Any) -> list[str]:
    """Why `attn`, with the LayerNorm before it, stays with its library; empty: our op computes the same."""
    if wrapped := _not_linear(attn):
        kinds = {f"{type(getattr(attn, name)).__module__}.{type(getattr(attn, name)).__name__}" for name in wrapped}
        return [f"{', '.join(wrapped)}: {', '.join(sorted(kinds))}, not a plain torch Linear"]
    reasons = _beyond_formula(attn)
    inner, keys, values = (getattr(attn, name).weight.shape[0] for name in PROJECTIONS)
    if keys != inner or values != inner or inner % attn.heads:
        reasons.append(f"keys and values of {keys} and {values} columns do not go with {inner} of the queries")
    elif abs(getattr(attn, "scale", (inner // attn.heads) ** -0.5) * (inner // attn.heads) ** 0.5 - 1) > 1e-6:
        reasons.append(f"it scales logits by {attn.scale}")
    if attn.training and any(layer.p for layer in attn.to_out[1:] if isinstance(layer, nn.Dropout)):
        reasons.append("it drops out in training")
    if type(norm) is not nn.LayerNorm or norm.weight is None or norm.bias is None:
        reasons.append(f"its norm is {norm}, not a LayerNorm with weight and bias")
    if any(_is_hooked(module) for module in _layers(attn, norm)):
        reasons.append("a hook on it, or on a layer of it, would be passed by (offloading and casting use such)")
    return reasons


def fingerprint(attn: Any, norm: Any) -> tuple:
    """What of these reasons changes while a model is in use: LoRA, adapters, hooks, mode; quicker to look at."""
    own = attn.__dict__
    changing = attn.training, type(own.get("processor")), len(attn._modules), *(own.get(name) for name in EXTRAS)
    return *changing, *((type(module), _is_hooked(module)) for module in _layers(attn, norm))


def _not_linear(attn: Any) -> list[str]:
    """Of the four projections those that LoRA, quantisation or a parametrisation has made something else."""
    names = [name for name in PROJECTIONS if type(getattr(attn, name)) is not nn.Linear]
    plain = type(attn.to_out) in (nn.Sequential, nn.ModuleList) and type(attn.to_out[0]) is nn.Linear
    return names if plain else [*names, "to_out"]


def _beyond_formula(attn: Any) -> list[str]:
    reasons = [f"it has {name}" for name, module in attn.named_children() if name not in PARTS]
    reasons += [f"it has {name}" for name, without in EXTRAS.items() if getattr(attn, name, without) != without]
    if hasattr(attn, "processor"):
        kind = type(attn.processor)
        if kind.__name__ not in PLAIN_PROCESSORS or not kind.__module__.startswith("diffusers."):
            reasons.append(f"its processor is {kind.__module__}.{kind.__name__}")
    if any(getattr(attn, name).bias is not None for name in PROJECTIONS):
        reasons.append("its queries, keys or values have a bias")
    if any(type(layer) not in (nn.Dropout, nn.Identity) for layer in attn.to_out[1:]):
        reasons.append("its way out is more than a Linear and a Dropout")
    return reasons


def _layers(attn: Any, norm: Any) -> list[nn.Module]:
    parts = attn._modules  # by getattr it takes three times as long
    return [attn, norm, *(parts[name] for name in PARTS[:4]), *parts["to_out"]._modules.values()]


def _is_hooked(module: nn.Module) -> bool:
    """Whether something listens to the module's calls, or took the place of its `forward`."""
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(hooks) or "forward" in own


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


def ldm_block_reasons(block: Any) -> list[str]:
    """The same for latent-diffusion code's block, which others have taken further."""
    known = ("attn1", "attn2", "ff", "norm1", "norm2", "norm3")
    reasons = [f"its block has {name}" for name, _ in block.named_children() if name not in known]
    if getattr(block, "disable_self_attn", False):
        reasons.append("its block's self-attention is switched off")
    return reasons
