"""What one program of the GroupNorm kernels takes, by the sizes alone."""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import triton

WIDTHS = (1, 2, 4, 6, 8, 12, 16)  # those of first stages and U-Nets: 32 to 512 channels in 32 groups
BLOCK_D = (4, 16, 64)  # columns of a group of any other width
# positions of a tile -> its columns; of 64 and 256 positions the fastest on an H200 (docs/results/h200/run3/norms.json)
COLUMNS = {4: 256, 16: 128, 64: 16, 256: 16}
TILE = 8192  # elements of one program at most


class Tile(NamedTuple):
    """Positions and columns of one program, columns and channels (0: any) of one group, whether it is read once."""

    rows: int
    columns: int
    group: int
    width: int
    single: bool

    @classmethod
    def of(cls, L: int, C: int, groups: int) -> "Tile":
        D = C // groups
        width = D if D in WIDTHS and C % 8 == 0 else 0
        group = triton.next_power_of_2(D) if width else min(d for d in BLOCK_D if d >= D)
        # fewer to compile: narrow groups are those of large images
        lengths = ([64, 256] if width < 8 else list(COLUMNS)) if width else [16, 256]
        rows = next((r for r in lengths if r >= L), lengths[-1])
        columns = max(COLUMNS[rows], group)
        if width != group:  # there are gaps
            columns = max(columns, min(2 * columns, TILE // rows))
        rows = min(rows, TILE // columns)
        return cls(rows, columns, group, width, rows >= L)

    @property
    def num_warps(self) -> int:
        """16 elements for each thread; 32 of many positions, and of the longest code, for which there are registers."""
        many = self.rows > 64 or not (self.width or self.single)
        return self.rows * self.columns // (1024 if many else 512)

    def programs(self, groups: int) -> int:
        """For one sample."""
        return triton.cdiv(groups, self.columns // self.group)

    def constexprs(self, scale: bool, shift: bool, silu: bool, x_bias: bool) -> dict:
        blocks = {"BLOCK_L": self.rows, "BLOCK_C": self.columns, "BLOCK_D": self.group, "WIDTH": self.width}
        options = {"HAS_SCALE": scale, "HAS_SHIFT": shift, "SILU": silu, "HAS_X_BIAS": x_bias}
        return blocks | {"SINGLE": self.single} | options


def gate_tiles() -> Iterator[Tile]:
    """Of the tiles that differ by their group's width alone the narrowest and the widest."""
    lengths = (*COLUMNS, max(COLUMNS) + 1)
    tiles = {Tile.of(L, 8 * D, 8) for D in WIDTHS for L in lengths}
    tiles |= {Tile.of(L, D - 1, 1) for D in BLOCK_D for L in lengths}  # of other widths
    for _, alike in groupby(sorted(tiles, key=_but_width), _but_width):
        by_width = sorted(alike, key=lambda tile: tile.group)
        yield from dict.fromkeys((by_width[0], by_width[-1]))


def _but_width(tile: Tile) -> tuple:
    """What of a tile decides its code: positions, columns, whether it is read once, whether it has gaps."""
    return tile.rows, tile.columns, tile.single, tile.width > 0, tile.width == tile.group
