"""Whether a swapped factor arrives and the others stay: outputs are read by the nearest of all the room's images.

A concept stands for the factor that explains most of its variance. One factor's concepts are put from a source
image into a target; the output's factors are those of the nearest true image. A right swap has the source's value of
that factor and the target's of all others.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from encdiff import SamplingEngine
from encdiff.data import to_float, to_uint8


def explained(codes: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Of each code's variance the share between a factor's values, (N, F); codes (n, N) of the complete grid."""
    grid = codes.reshape(*sizes, -1)
    total = codes.var(0) + 1e-12
    axes = range(len(sizes))
    return np.stack([grid.mean(tuple(a for a in axes if a != f)).var(0) / total for f in axes], axis=1)


@torch.no_grad()
def nearest(images: Tensor, pixels: Tensor, rows: int = 16384) -> Tensor:
    """Indices (m,) of the true images, uint8 (n, S, S, 3), that are nearest to images (m, 3, S, S) in [-1, 1]."""
    flat = images.permute(0, 2, 3, 1).flatten(1)
    best, found = torch.full((len(flat),), torch.inf, device=flat.device), torch.zeros(len(flat), dtype=torch.int64)
    found = found.to(flat.device)
    for start in range(0, len(pixels), rows):
        part = pixels[start : start + rows].flatten(1).float() / 127.5 - 1
        distances = part.square().sum(1) - 2 * flat @ part.T  # but for |image|^2, the same for all
        values, at = distances.min(1)
        closer = values < best
        best, found = torch.where(closer, values, best), torch.where(closer, at + start, found)
    return found


@torch.no_grad()
def measure(model, room, codes: np.ndarray, picture: Path, pairs: int = 128, steps: int = 20) -> dict:
    """Rates over random pairs: all factors right in reconstructions; each factor arrived, and the others kept.

    `picture`, one pair a column: source, target, the target's reconstruction, then each factor in turn swapped.
    """
    sizes, names, device = room.factor_sizes, room.factor_names, room.pixels.device
    owner = explained(codes, sizes).argmax(1)
    rng = np.random.default_rng(0)
    source, target = (rng.integers(len(room), size=pairs) for _ in range(2))
    scalars = torch.from_numpy(codes).to(device)
    draw = SamplingEngine(model.eval(), steps=steps)
    wanted, given = [room.factors(target)], [scalars[target]]
    for f in range(len(sizes)):
        factors, mixed = room.factors(target).copy(), scalars[target].clone()
        factors[:, f] = room.factors(source)[:, f]
        chosen = np.flatnonzero(owner == f)
        mixed[:, chosen] = scalars[source][:, chosen]
        wanted.append(factors)
        given.append(mixed)
    drawn = [draw(part) for part in given]
    true = [to_float(room.pixels[torch.as_tensor(of[:12])]) for of in (source, target)]
    write(picture, torch.stack([*true, *(images[:12] for images in drawn)]))
    read = [room.factors(nearest(images, room.pixels).cpu().numpy()) for images in drawn]
    right = [r == w for r, w in zip(read, wanted, strict=True)]
    moved = room.factors(source) != room.factors(target)
    found = {"reconstructed, all factors": float(right[0].all(1).mean())}
    found |= {f"reconstructed {name}": float(right[0][:, f].mean()) for f, name in enumerate(names)}
    for f, name in enumerate(names):
        others = np.delete(right[f + 1], f, axis=1)
        found[f"{name} arrived"] = float(right[f + 1][moved[:, f], f].mean())
        found[f"{name} swapped, others kept"] = float(others.all(1).mean())
    error = (drawn[0] - to_float(room.pixels[torch.as_tensor(target)])).square().mean().item() / 4
    return found | {"psnr": -10 * np.log10(error), "concepts of each factor": np.bincount(owner, minlength=6).tolist()}


def write(path: Path, images: Tensor) -> None:
    """Rows of images (rows, columns, 3, S, S) as one PNG."""
    pixels = to_uint8(rearrange(images, "r c k h w -> 1 k (r h) (c w)"))[0]
    Image.fromarray(pixels.cpu().numpy()).save(path)


def main(arguments: list[str] | None = None) -> None:
    """`python -m bench.gpu.counterfactual MODEL`: a model's rates, on a GPU if there is one."""
    import argparse
    import json

    from encdiff import EncDiff
    from encdiff.data import open_dataset

    parser = argparse.ArgumentParser(prog="python -m bench.gpu.counterfactual", description=main.__doc__)
    parser.add_argument("model", help="room64, quickstart, or a folder that save_pretrained wrote, such as RUN/model")
    parser.add_argument("--data", default="procedural:5,5,5,4,4,5", help="the grid; the rates are of what it holds")
    parser.add_argument("--pairs", type=int, default=128, help="minutes on a CPU for 128")
    parser.add_argument(
        "--out", type=Path, default=Path("swaps.png"),
        help="picture, a pair a column: source, target, reconstruction, then each factor in turn swapped",
    )  # fmt: skip
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shown = EncDiff.from_pretrained(given.model, device=device).eval()
    room = open_dataset(given.data, shown.config.image_size)
    room.pixels = torch.from_numpy(room.images(np.arange(len(room)))).to(device)
    codes = torch.cat([shown.encode(to_float(part)) for part in room.pixels.split(512)]).detach()
    found = measure(shown, room, codes.float().cpu().numpy(), given.out, given.pairs)
    print(json.dumps(found, indent=1))
    print(f"picture: {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
