"""Transformer blocks of other libraries with our attention in them: their own class, but for one method.

A block rather than a processor, since LayerNorm and residual are the block's: one op takes them, too. The block keeps
its parameters, its place and its class's name; `block.__class__` alone changes, so that state dicts, configurations and
`isinstance` are as before.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from encdiff import ops
from encdiff.interop.reasons import attention_reasons, block_reasons, fingerprint, ldm_block_reasons
from encdiff.interop.state import Patch

ATTENTIONS = "attn1", "attn2"


class Patched(nn.Module):
    """What a patched block has beside what it had."""

    encdiff_original: type  # the class that it stands for
    encdiff_patch: Patch  # of its U-Net
    encdiff_name: str  # in its U-Net
    attn1: Any
    attn2: Any
    norm1: Any
    norm2: Any
    norm3: Any
    ff: Any

    def __reduce_ex__(self, protocol):
        """To copy and pickle: the class is made at run time, so it is told by the one that it stands for."""
        return _blank, (self.encdiff_original,), self.__getstate__()


class DiffusersBlock(Patched):
    """diffusers' BasicTransformerBlock."""

    only_cross_attention: bool
    _chunk_size: int | None
    _chunk_dim: int

    def forward(
        self, hidden_states, attention_mask=None, encoder_hidden_states=None, encoder_attention_mask=None,
        timestep=None, cross_attention_kwargs=None, class_labels=None, added_cond_kwargs=None,
    ):  # fmt: skip
        options = {k: v for k, v in (cross_attention_kwargs or {}).items() if k != "scale"}  # LoRA's, of no effect here
        x, context = hidden_states, encoder_hidden_states
        if x.ndim != 3 or options.get("gligen") is not None or block_reasons(self):
            return super().forward(
                hidden_states, attention_mask, encoder_hidden_states, encoder_attention_mask, timestep,
                cross_attention_kwargs, class_labels, added_cond_kwargs,
            )  # fmt: skip
        given = dict(encoder_hidden_states=context if self.only_cross_attention else None, **options)
        plain = attention_mask is None and not options
        stock = lambda: self.attn1(self.norm1(x), attention_mask=attention_mask, **given)  # noqa: E731
        x = attend(self, "attn1", x, None, None, plain, stock)
        if self.attn2 is not None and self.attn2.is_cross_attention:
            x = self._cross_attend(x, context, encoder_attention_mask, options)
        elif self.attn2 is not None:  # attends to the features a second time
            given = dict(encoder_hidden_states=context, attention_mask=encoder_attention_mask, **options)
            x = self.attn2(self.norm2(x), **given) + x
        h = self.norm3(x)
        if self._chunk_size is None:
            return x + self.ff(h)
        return x + torch.cat([self.ff(part) for part in h.split(self._chunk_size, self._chunk_dim)], self._chunk_dim)

    def _cross_attend(self, x: Tensor, context: Tensor | None, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
        plain, bias = isinstance(context, Tensor) and context.ndim == 3 and not options, None
        if plain and context is not None and mask is not None:  # (B, 1, N), a bias for each token
            plain = mask.shape == (len(context), 1, context.shape[1])
            bias = mask[:, 0] if plain else None
        given = dict(encoder_hidden_states=context, attention_mask=mask, **options)
        return attend(self, "attn2", x, context, bias, plain, lambda: self.attn2(self.norm2(x), **given))


class LDMBlock(Patched):
    """The BasicTransformerBlock of latent-diffusion code, and of what is made from it."""

    def encdiff_forward(self, x, context=None, *others, **options):
        if ldm_block_reasons(self) or any(other is not None for other in (*others, *options.values())):
            stock = getattr(self.encdiff_original, method_of(self.encdiff_original))
            return stock(self, x, context, *others, **options)
        x = attend(self, "attn1", x, None, None, True, lambda: self.attn1(self.norm1(x)))
        plain = isinstance(context, Tensor) and context.ndim == 3
        x = attend(self, "attn2", x, context, None, plain, lambda: self.attn2(self.norm2(x), context))
        return self.ff(self.norm3(x)) + x


def attend(
    block: Patched, which: str, x: Tensor, context: Tensor | None, bias: Tensor | None, plain: bool, stock: Callable
) -> Tensor:
    """x + the block's attention `which`: computed, kept for later too, or what was kept before (T-GATE).

    By our op where the call is `plain` and the layer served, else by `stock()`, the library's own.
    """
    patch, name = block.encdiff_patch, full_name(block, which)

    def compute(residual: bool) -> Tensor:
        if plain and is_served(block, which, name):
            return _by_ops(block, which, name, x, context, bias, residual)
        return x + stock() if residual else stock()

    mode = patch.modes[which]
    if mode == "compute":
        return compute(residual=True)
    if mode == "keep":
        y = compute(residual=False)
        patch.keep(name, y)
        return x + y
    return x + patch.recall(name, x)


def _by_ops(
    block: Patched, which: str, name: str, x: Tensor, context: Tensor | None, bias: Tensor | None, residual: bool
) -> Tensor:
    patch, attn, norm = block.encdiff_patch, *parts_of(block, which)
    weights = attn.to_q.weight, attn.to_k.weight, attn.to_v.weight, attn.to_out[0].weight, attn.to_out[0].bias
    options = dict(
        heads=attn.heads, norm_weight=norm.weight, norm_bias=norm.bias, norm_eps=norm.eps, residual=residual,
        impl=patch.impl,
    )  # fmt: skip
    if context is None:
        return ops.self_attention(x, *weights, **options)
    options |= dict(token_bias=bias, projected=patch.projected(name, attn, context))
    recording = [(names[name], recorder) for names, recorder in patch.maps if name in names]
    if not recording:
        return ops.cross_attention(x, context, *weights, **options)
    y, attention = ops.cross_attention(x, context, *weights, maps="mean", **options)
    for known_as, recorder in recording:
        recorder.take(known_as, attention)
    return y


def full_name(block: Patched, which: str) -> str:
    """Of an attention in its U-Net."""
    return f"{block.encdiff_name}.{which}".removeprefix(".")


def parts_of(block: Patched, which: str) -> tuple[Any, Any]:
    """An attention and the norm before it."""
    return block._modules[which], block._modules[which.replace("attn", "norm")]


def reasons(block: Patched, which: str) -> list[str]:
    """Why an attention of a patched block stays with its library, as of now."""
    found = block_reasons(block) if isinstance(block, DiffusersBlock) else ldm_block_reasons(block)
    if "forward" in block.__dict__:
        found.append("a hook took the place of its block's forward")
    if which == "attn1" and not block.encdiff_patch.self_attention:
        found.append("self_attention=True was not asked for")
    elif which == "attn1" and getattr(block, "only_cross_attention", False):
        found.append("it attends to the tokens")
    elif which == "attn2" and not getattr(block.attn2, "is_cross_attention", True):
        found.append("it attends to the features, not to tokens")
    return found or attention_reasons(*parts_of(block, which))


def is_served(block: Patched, which: str, name: str) -> bool:
    """Looked up at every call, since a layer may get LoRA or a hook at any time."""
    if torch.compiler.is_compiling():  # what is looked at becomes a guard of the graph
        return not reasons(block, which)
    patch, seen = block.encdiff_patch, fingerprint(*parts_of(block, which))
    if patch.served.get(name, (None,))[0] != seen:
        patch.served[name] = seen, not reasons(block, which)
        patch.tokens.pop(name, None)
    return patch.served[name][1]


@cache
def patched_class(cls: type) -> type | None:
    """`cls` with our method in the place of its own; None for a class that is not known."""
    body: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "encdiff_original": cls}
    known: Any = next((c for c in cls.__mro__ if c.__name__ == "BasicTransformerBlock"), None)
    if known is None:
        return None
    method = "forward" if known.__module__.startswith("diffusers.") else method_of(known)
    if getattr(cls, method) is not getattr(known, method):  # a subclass that does something else
        return None
    if known.__module__.startswith("diffusers."):
        return type(cls.__name__, (DiffusersBlock, cls), body)
    if list(inspect.signature(getattr(known, method)).parameters)[:3] != ["self", "x", "context"]:
        return None
    return type(cls.__name__, (LDMBlock, cls), body | {method: LDMBlock.encdiff_forward})


def method_of(cls: type) -> str:
    """Of latent-diffusion code: what the checkpointing of activations goes through is `_forward`."""
    return "_forward" if hasattr(cls, "_forward") else "forward"


def original(block: nn.Module) -> type:
    """The class that a block has, or had."""
    return block.encdiff_original if isinstance(block, Patched) else type(block)


def _blank(cls: type) -> nn.Module:
    made: Any = patched_class(cls)
    return made.__new__(made)
