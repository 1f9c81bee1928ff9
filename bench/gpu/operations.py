"""Block `ops`: every op at the paper's layers, bf16, calls in one graph over rotating inputs, beside the stock forms.

`compiled` is the published form under torch.compile, timed by a process of its own (`measure_compiled`).
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import published
from bench.clock import replayed
from bench.gpu.checks import layers
from bench.gpu.lab import Lab
from encdiff import ops
from encdiff.diffusion.samplers import ddim_coefficients
from encdiff.diffusion.schedules import alphas_cumprod, ddim_timesteps, make_betas
from encdiff.ops.cross_attention_folded import cross_attention_folded, fold

ROTATING = 4  # inputs that take turns
Form = Callable[..., Tensor]


class CrossAttention(nn.Module):
    """x + Attention(LN(x), tokens), as published; without a context width self-attention."""

    def __init__(self, channels: int, context_width: int | None, heads: int, attention: str):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.attention = published.Attention(channels, context_width or channels, heads, attention)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return x + self.attention(self.norm(x), context)

    def weights(self) -> dict[str, Tensor]:
        a = self.attention
        return {
            "w_q": a.to_q.weight, "w_k": a.to_k.weight, "w_v": a.to_v.weight, "w_o": a.to_out[0].weight,
            "b_o": a.to_out[0].bias, "norm_weight": self.norm.weight, "norm_bias": self.norm.bias,
        }  # fmt: skip


class Row:
    """An op at a shape: its forms, called with the tensors of `inputs()`; `learnt` take part in the gradients."""

    def __init__(self, name: str, forms: dict[str, Form], inputs: Callable[[], list[Tensor]], learnt, bytes: int):
        self.name, self.forms, self.inputs, self.learnt, self.bytes = name, forms, inputs, list(learnt), bytes


def rows(lab: Lab) -> Iterator[Row]:
    """Every op at the paper's layers."""
    for L, C in layers(lab.config):
        yield from _attention(lab, L, C)
        yield from _maps(lab, L, C)
        yield from _sequences(lab, L, C)
    yield _bank(lab)


def _draw(lab: Lab, *shape: int) -> Tensor:
    return torch.randn(shape, device=lab.device, dtype=torch.bfloat16)


def _attention(lab: Lab, L: int, C: int) -> Iterator[Row]:
    c, B = lab.config, lab.batch
    for kind, width in (("cross_attention", c.token_width), ("self_attention", None)):
        op = getattr(ops, kind)
        module = CrossAttention(C, width, c.heads, "einsum").to(lab.device, torch.bfloat16)
        fused = CrossAttention(C, width, c.heads, "sdpa").to(lab.device, torch.bfloat16)
        fused.load_state_dict(module.state_dict())

        def ours(x, *context, op=op, module=module):
            return op(x, *context, **module.weights(), heads=c.heads, residual=True)

        def inputs(width=width):
            return [_draw(lab, B, L, C)] + ([_draw(lab, B, c.concepts, width)] if width else [])

        every = {"ours": ours, "published": module, "sdpa": fused}
        yield Row(f"{kind} {L}x{C}", every, inputs, module.parameters(), 2 * B * L * C * 2)


def _maps(lab: Lab, L: int, C: int) -> Iterator[Row]:
    """What takes (B, C, H, W)."""
    B, side = lab.batch, int(L**0.5)
    norm = nn.GroupNorm(lab.config.groups, C).to(lab.device, torch.bfloat16)
    bias, size = _draw(lab, C).requires_grad_(), 2 * B * L * C

    def one() -> Tensor:
        return _draw(lab, B, C, side, side).to(memory_format=torch.channels_last)

    def ours_norm(x, scale, shift):
        return ops.group_norm(x, norm.weight, norm.bias, norm.num_groups, scale=scale, shift=shift, silu=True)

    def stock_norm(x, scale, shift):
        return F.silu(norm(x) * (1 + scale[..., None, None]) + shift[..., None, None])

    at = f"{side}x{side}x{C}"
    yield Row(f"group_norm {at}", {"ours": ours_norm, "published": stock_norm},
              lambda: [one(), *_draw(lab, 2, B, C)], norm.parameters(), 2 * size)  # fmt: skip
    sums = {"ours": lambda x, h: ops.residual_add(x, h, bias), "published": lambda x, h: x + (h + bias[:, None, None])}
    yield Row(f"residual_add {at}", sums, lambda: [one(), one()], [bias], 3 * size)
    for kind, stock in (("down", lambda x: F.avg_pool2d(x, 2)), ("up", lambda x: F.interpolate(x, scale_factor=2))):
        every = {"ours": lambda x, kind=kind: ops.resample(x, kind), "published": stock}
        yield Row(f"resample {kind} {at}", every, lambda: [one()], (), 5 * size // (4 if kind == "down" else 1))


def _sequences(lab: Lab, L: int, C: int) -> Iterator[Row]:
    """What takes (B, L, C), or a matrix."""
    B, inner = lab.batch, lab.config.feedforward * C
    layer = nn.LayerNorm(C).to(lab.device, torch.bfloat16)
    first, second = (nn.Linear(*io).to(lab.device, torch.bfloat16) for io in ((C, 2 * inner), (inner, C)))

    def stock_geglu(x):
        h, g = x.chunk(2, dim=-1)
        return h * F.gelu(g)

    def ours_layer_norm(x):
        return ops.layer_norm(x, layer.weight, layer.bias, layer.eps)

    def ours_feed_forward(x):
        norm = {"norm_weight": layer.weight, "norm_bias": layer.bias}
        h = ops.projection(x, first.weight, first.bias, gated=True, **norm)
        return ops.projection(h, second.weight, second.bias, residual=x)

    def inputs() -> list[Tensor]:
        return [_draw(lab, B, L, C)]

    feed_forward = {
        "ours": ours_feed_forward,
        "published": lambda x: x + second(stock_geglu(first(layer(x)))),
        "single ops": lambda x: x + second(ops.geglu(first(ours_layer_norm(x)))),
    }
    learnt, size = (*first.parameters(), *second.parameters()), 2 * B * L * C
    yield Row(
        f"layer_norm {L}x{C}", {"ours": ours_layer_norm, "published": layer}, inputs, layer.parameters(), 2 * size
    )
    yield Row(f"geglu {L}x{inner}", {"ours": ops.geglu, "published": stock_geglu},
              lambda: [_draw(lab, B, L, 2 * inner)], (), 3 * B * L * inner * 2)  # fmt: skip
    yield Row(f"feed-forward {L}x{C}", feed_forward, inputs, learnt, 2 * size)
    yield Row(f"column_sum {B * L}x{C}", {"ours": ops.column_sum, "published": lambda x: x.sum(0)},
              lambda: [_draw(lab, B * L, C)], (), size)  # fmt: skip


def _bank(lab: Lab) -> Row:
    c, B = lab.config, lab.batch
    bank = published.Bank(c).to(lab.device, torch.bfloat16)
    stacked = [[torch.stack([getattr(m[i], n).detach() for m in bank]).requires_grad_() for i in (0, 2, 4)]
               for n in ("weight", "bias")]  # fmt: skip
    size = sum(t.numel() for t in (*stacked[0], *stacked[1]))
    return Row("mlp_bank", {"ours": lambda s: ops.mlp_bank(s, *stacked), "published": bank},
               lambda: [_draw(lab, B, c.concepts)], (*stacked[0], *stacked[1]),
               2 * (size + B * c.concepts * (1 + c.token_width)))  # fmt: skip


def time_row(lab: Lab, row: Row, form: Form) -> dict[str, float]:
    """Seconds forward without gradients, and forward with backward."""
    sets = [row.inputs() for _ in range(ROTATING if not lab.cpu else 1)]
    for given in sets:
        for t in given:
            t.requires_grad_()
    upstream = torch.randn_like(form(*sets[0]))
    parameters = [p for p in (form.parameters() if isinstance(form, nn.Module) else row.learnt)]

    def forward(given):
        with torch.no_grad():
            return form(*given)

    def both(given):
        return torch.autograd.grad(form(*given), [*given, *parameters], upstream, allow_unused=True)

    return {phase: replayed([lambda g=g, f=f: f(g) for g in sets], lab.device)
            for phase, f in (("forward", forward), ("forward_backward", both))}  # fmt: skip


def measure(lab: Lab) -> dict:
    found: dict[str, dict] = {}
    for row in rows(lab):
        found[row.name] = {"bytes": row.bytes}
        for name, form in row.forms.items():
            try:
                found[row.name][name] = time_row(lab, row, form)
            except Exception as error:
                if type(error).__name__ == "Late":
                    raise
                found[row.name][name] = f"{type(error).__name__}: {str(error)[:300]}"
        lab.save("ops", found)
    found["sixteen folded layers"] = {"ours": {"forward": sixteen_layers(lab)}}
    found |= noise(lab)
    lab.save("ops", found)
    return found


def sixteen_layers(lab: Lab) -> float:
    """Seconds of all cross-attentions of one sampling evaluation of the paper's U-Net, tokens folded before."""
    c, on, half, runs = lab.config, lab.device, torch.bfloat16, []
    with torch.no_grad():
        for (L, C), count in zip(layers(c), (5, 5, 5, 1), strict=False):
            module = CrossAttention(C, c.token_width, c.heads, "einsum").to(on, half)
            w = module.weights()
            tokens = torch.randn(lab.batch, c.concepts, c.token_width, device=on, dtype=half)
            folded = fold(tokens, *(w.pop(n) for n in ("w_q", "w_k", "w_v", "w_o")), heads=c.heads)
            b_o = w.pop("b_o")
            for _ in range(count):
                x = torch.randn(lab.batch, L, C, device=on, dtype=half)
                runs.append(lambda x=x, f=folded, b=b_o, w=w: cross_attention_folded(x, f, b, **w, residual=True))

        def all_of_them():
            with torch.no_grad():
                return [run() for run in runs]

        return replayed(all_of_them, on, calls=4)


def noise(lab: Lab) -> dict:
    """The noise engine past the cache, beside a copy: q_sample with drawn noise, one sampler step."""
    on, found = lab.device, {}
    alpha_bar = alphas_cumprod(make_betas("scaled_linear"))
    for batch in (128, 32768) if not lab.cpu else (8,):
        x = torch.randn(batch, 3, 16, 16, device=on)
        t, ids = torch.randint(1000, (batch,), device=on), torch.arange(batch, device=on)
        draw, table = torch.zeros((), dtype=torch.int64, device=on), alpha_bar.to(on)
        out = (torch.empty_like(x), torch.empty_like(x))
        coefficients = ddim_coefficients(alpha_bar, ddim_timesteps(50, 1000))[25:26].to(on, torch.float32)
        signal, sigma = table.sqrt().float(), (1 - table).sqrt().float()

        def eager(x=x, t=t, signal=signal, sigma=sigma):
            e = torch.randn_like(x)
            return signal[t].view(-1, 1, 1, 1) * x + sigma[t].view(-1, 1, 1, 1) * e, e

        runs = {
            "q_sample": lambda x=x, t=t, ids=ids, table=table, draw=draw, out=out: ops.q_sample(
                x, None, t, table, seed=1, sample_ids=ids, draw=draw, out=out),
            "q_sample, published": eager,
            "step": lambda x=x, c=coefficients, out=out: ops.step(x, out[1], c, out=out[0]),
            "copy": lambda x=x, out=out: out[0].copy_(x),
        }  # fmt: skip
        for name, run in runs.items():
            moved = (2 if name == "copy" else 3) * x.nbytes
            seconds = replayed(run, on)
            found[f"noise {name} {batch}x3x16x16"] = {
                "bytes": moved,
                "ours": {"forward": seconds},
                "gbps": moved / seconds / 1e9,
            }
    return found


def measure_compiled(lab: Lab, ready: Callable[[], None]) -> dict:
    """The published forms under torch.compile; `ready` returns when the device is free to be timed."""
    forms = {}
    torch._dynamo.config.recompile_limit = 64  # one function, many shapes
    for row in rows(lab):
        if not row.name.startswith("cross_attention"):
            continue
        compiled = torch.compile(row.forms["sdpa" if "sdpa" in row.forms else "published"], dynamic=False)
        given = [t.requires_grad_() for t in row.inputs()]
        y = compiled(*given)
        torch.autograd.grad(y, given, torch.randn_like(y))
        with torch.no_grad():
            compiled(*given)
        forms[row.name] = (row, compiled)
    ready()
    return {name: time_row(lab, row, form) for name, (row, form) in forms.items()}


def lines(found: dict) -> list[str]:
    said = []
    for name, r in found.items():
        parts = []
        for form in ("ours", "published", "sdpa"):
            if isinstance(r.get(form), dict):
                parts.append(f"{form} " + " / ".join(f"{1e6 * s:.1f}" for s in r[form].values()))
            elif form in r:
                parts.append(f"{form} FAILED {r[form][:60]}")
        said.append(f"{name:30} us {', '.join(parts)}" + (f", {r['gbps']:.0f} GB/s" if "gbps" in r else ""))
    return said
