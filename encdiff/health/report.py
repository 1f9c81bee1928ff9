"""`encdiff doctor`: one report of the machine, of every kernel on it, and of what each op would take."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from encdiff.errors import InputError
from encdiff.health import kernels, machine
from encdiff.ops import OPS, _self_check, explain
from encdiff.ops._check import LIMITS, Finding
from encdiff.ops.cross_attention_folded import fold

TYPES = tuple(LIMITS)
MOST = 20  # problems that are written out


@dataclass
class Report:
    """What the doctor found; `problems` is empty, and `ok` True, where nothing is wrong."""

    device: str
    machine: dict[str, str]
    how: str  # kernels were run
    findings: list[Finding]
    compiled: str  # what else was compiled, not run
    rates: dict[str, float]
    choices: dict[str, str]
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict:
        """For JSON."""
        return asdict(self) | {"findings": [f._asdict() for f in self.findings], "ok": self.ok}

    def __str__(self) -> str:
        return "\n".join([*self._machine(), "", *self._kernels(), "", *self._choices(), "", *self._verdict()])

    def _machine(self) -> list[str]:
        named = [(name.rsplit(" ", 1), rate) for name, rate in self.rates.items()]
        measured = ", ".join(f"{name} {_scaled(rate)}{unit}" for (name, unit), rate in named)
        return [f"{name:<15}{value}" for name, value in (self.machine | {"measured": measured}).items()]

    def _kernels(self) -> list[str]:
        """A line for each family: variants, those that are wrong, and the worst error by the type of the features."""
        types = "".join(f"{name:>11}" for name in TYPES)
        lines = [f"{f'kernels, {self.how}':<54}{'checks':>7}{'wrong':>6}  worst error:{types}"]
        for name in dict.fromkeys(f.family for f in self.findings):
            own = [f for f in self.findings if f.family == name]
            wrong = sum(bool(f.wrong) for f in own)
            lines.append(f"  {name:<52}{len(own):>7}{wrong:>6}{'':14}{''.join(_worst(own, t) for t in TYPES)}")
        return lines + ([f"  {self.compiled}"] if self.compiled else [])

    def _choices(self) -> list[str]:
        lines = [f"what an op takes on {self.device}, in the paper's layer of 16x16 positions"]
        return lines + [f"  {name:<24}{said}" for name, said in self.choices.items()]

    def _verdict(self) -> list[str]:
        if self.ok:
            return [f"all {len(self.findings)} checks passed"]
        more = [f"  and {len(self.problems) - MOST} more"] if len(self.problems) > MOST else []
        return [f"{len(self.problems)} wrong:", *(f"  {problem}" for problem in self.problems[:MOST]), *more]


def _worst(findings: list[Finding], dtype: str) -> str:
    """The worst error of those whose widest rounding is of this type."""
    own = [f for f in findings if max((p for p in f.variant if p in LIMITS), key=LIMITS.__getitem__) == dtype]
    errors = [error for f in own for error in f.errors.values()]
    return f"{f'{max(errors):.1e}' if errors else '-':>11}"


def _scaled(rate: float) -> str:
    power = min(4, int(math.log10(rate)) // 3)
    return f"{rate / 1000**power:.3g} {' kMGT'[power].strip()}"


def doctor(
    device: str = "auto", families: list[str] | None = None, progress: Callable[[int, int], None] | None = None
) -> Report:
    """Look at this machine and check every kernel on it against float64, forward and every gradient.

    On a GPU kernels are compiled and run there, and the verdicts kept for this card (see `encdiff.ops._self_check`) are
    replaced. Without one they are interpreted on the CPU, and one case of each is compiled for sm_90. Takes a minute
    or two.

    Args:
        device: "auto" takes a GPU if there is one; "cpu", "cuda", "cuda:1".
        families: the kernels to check, such as "group_norm"; None: all.
        progress: called with (checks done, all of them).

    Raises:
        InputError: no such device or family here.
    """
    on = _device(device)
    known = list(kernels.families(on))
    if unknown := [name for name in families or () if name not in known]:
        raise InputError(f"kernel {unknown[0]!r} must be one of {', '.join(known)}")
    found = kernels.check_all(on, families or known, lambda _, *done: progress and progress(*done))
    gpu = on.type == "cuda"
    if gpu:
        _self_check.replace(on.index, [f for f in found if f.family in kernels._families.FAMILIES])
    no_triton = kernels.not_for(on)
    compiled, failures = ("", []) if gpu or no_triton else _compile_ahead()
    described = machine.describe(on)
    problems = [f"{finding}: {'; '.join(finding.wrong)}" for finding in found if finding.wrong] + failures
    engine = described["native engine"]
    if "does not load" in engine or ("not built" in engine and "no C++ compiler" not in engine):
        problems.append(engine)
    how = f"compiled, on {_self_check.card(on.index)}" if gpu else "interpreted: no GPU"
    how = f"none of Triton: {'; '.join(no_triton)}" if no_triton else how
    return Report(str(on), described, how, found, compiled, machine.rates(on), choices(on), problems)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise InputError(f"device {name!r} is not here, must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {name!r}: no GPU that PyTorch {torch.__version__} can use, must be cpu")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _compile_ahead() -> tuple[str, list[str]]:
    """One case of each Triton kernel for sm_90; what the gate says of it, and its failures."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "encdiff.kernels._gate", "--brief"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    *rows, last = done.stdout.splitlines() or [""]
    failed = [row for row in rows[1:] if not row.endswith(" ok")]
    if done.returncode and not failed:
        failed = [f"kernels cannot be compiled: {' '.join(done.stderr.split())[-300:]}"]
    return f"compiled for sm_90, not run: {last} (all tiles: python -m encdiff.kernels._gate)", failed


def choices(device: torch.device) -> dict[str, str]:
    """For each op what it would take, and what speaks against those before it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return {name: _choice(name, *given) for name, given in _examples(device, dtype).items() if name in OPS}


def _choice(name: str, args: tuple, options: dict) -> str:
    against: list[str] = []
    for line in explain(name, *args, **options).splitlines():
        _, implementation, verdict = (part.strip() for part in line.split(":", 2))
        if verdict in ("chosen", "forced"):
            return f"{implementation}{f' ({verdict})' * (verdict == 'forced')}{''.join(against)}"
        against.append(f"; not {implementation}: {verdict}")
    return "none" + "".join(against)


def _examples(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[tuple, dict]]:
    """Arguments of every op, as a sampling evaluation or a step of the paper's configuration has them."""
    B, L, C, N, D = 2, 256, 64, 20, 16

    def of(*shape: int) -> Tensor:
        return torch.zeros(shape, device=device, dtype=dtype)

    x, context, C2 = of(B, L, C), of(B, N, D), (C, C)
    w = {"w_q": of(*C2), "w_k": of(C, D), "w_v": of(C, D), "w_o": of(*C2)}
    norm = {"heads": 8, "norm_weight": of(C), "norm_bias": of(C), "residual": True}
    maps = of(B, C, 16, 16).to(memory_format=torch.channels_last)
    bank = [of(N, o, i) for i, o in ((1, 64), (64, 128), (128, D))], [of(N, o) for o in (64, 128, D)]
    latents = torch.zeros(B, 3, 16, 16, device=device)
    numbers, ids = torch.zeros(64, device=device), torch.arange(B, device=device)
    folded = {k: v for k, v in norm.items() if k != "heads"}
    return {
        "cross_attention": ((x, context, *w.values()), norm),
        "cross_attention_folded": ((x, fold(context, *w.values(), heads=8)), folded),
        "self_attention": ((x, *[of(*C2) for _ in range(4)]), norm),
        "mlp_bank": ((of(B, N), *bank), {}),
        "group_norm": ((maps, of(C), of(C), 32), {"silu": True}),
        "layer_norm": ((x, of(C), of(C)), {}),
        "resample": ((maps, "down"), {"beside": maps}),
        "residual_add": ((maps, maps, of(C)), {}),
        "geglu": ((of(B, L, 8 * C),), {}),
        "projection": ((x, of(8 * C, C), of(8 * C)), {"norm_weight": of(C), "norm_bias": of(C), "gated": True}),
        "column_sum": ((of(B * L, C), dtype), {}),
        "adamw": ((numbers, numbers.to(dtype), numbers, numbers, torch.zeros(4, device=device)), {}),
        "q_sample": ((latents, latents, ids, torch.ones(1000, device=device, dtype=torch.float64)), {}),
        "step": ((latents, latents, torch.zeros(B, 5, device=device)), {}),
        "normal": ((latents.shape, 0, ids, 0), {}),
        "uniform": ((latents.shape, 0, ids, 0), {}),
    }
