"""Which route of cross-attention, and with which tiles: tables and a cost model to be read, no tuning at run time.

In 16 bits the tiles of the folded route are among the fastest of a sweep at the paper's layers on an H200
(docs/results/h200/run3/tiles.json); they may spill some registers. The others are the largest that spill none. The cost
model predicts, and by three times too little for whole ops on an H100 (bench/NOTES.md): it ranks, it tells no times.
"""

from typing import NamedTuple

MAX_TOKENS, FEW_TOKENS = 1024, 32
FOLDED_TOKENS, FOLDED_CHANNELS = 32, {2: 256, 4: 64}

# of the card that the model has in mind, an H200: copy bandwidth in bytes/s and seconds from one kernel of a graph to
# the next as measured (docs/results/h200), an attainable rate of 16-bit and of float32 products in FLOP/s, the paper's
# batch
BANDWIDTH, RATE, LAUNCH, BATCH = 4.15e12, {2: 400e12, 4: 30e12}, 1e-6, 128
CACHE_BANDWIDTH = 5.5e12  # bytes/s of what many programs read again


class FoldedTile(NamedTuple):
    BLOCK_L: int  # queries at a time
    GROUP: int  # heads at a time, 32 columns each
    num_warps: int
    num_stages: int = 2


class HeadsTile(NamedTuple):
    BLOCK_L: int  # queries at a time
    BLOCK_N: int  # tokens at a time
    num_warps: int
    num_stages: int = 2


# (kernel, 16 bit?, channels padded) -> tile
FOLDED_TILES = {
    ("fwd", True, 64): FoldedTile(64, 1, 4),
    ("fwd", True, 128): FoldedTile(64, 2, 4),
    ("fwd", True, 256): FoldedTile(16, 2, 4),
    ("dx", True, 64): FoldedTile(128, 1, 4, 1),
    ("dx", True, 128): FoldedTile(64, 1, 4),
    ("dx", True, 256): FoldedTile(16, 2, 8),
    ("dkv", True, 64): FoldedTile(64, 1, 4),
    ("dkv", True, 128): FoldedTile(64, 1, 4),
    ("dkv", True, 256): FoldedTile(16, 1, 8),
    ("fwd", False, 64): FoldedTile(16, 1, 4),
    ("dx", False, 64): FoldedTile(16, 1, 8),
    ("dkv", False, 64): FoldedTile(16, 1, 8),
}

SPILLS = 320  # bytes of a thread that those of 16 bits may spill

# of 16 queries: one warp, in 64 rows three quarters would be masked; one stage, there is no second pass to load for
SHORT = HeadsTile(16, FEW_TOKENS, 1, 1)

# (kernel, 16 bit?, head width padded) -> tile
HEADS_TILES = {
    ("fwd", True, 32): HeadsTile(64, 128, 4),
    ("fwd", True, 64): HeadsTile(64, 128, 8),
    ("fwd", True, 128): HeadsTile(64, 128, 8),
    ("fwd", True, 256): HeadsTile(32, 128, 8),
    ("dq", True, 32): HeadsTile(64, 128, 8),
    ("dq", True, 64): HeadsTile(64, 128, 8),
    ("dq", True, 128): HeadsTile(64, 128, 8),
    ("dq", True, 256): HeadsTile(32, 128, 8),
    ("dkv", True, 32): HeadsTile(64, 32, 4),
    ("dkv", True, 64): HeadsTile(64, 32, 4),
    ("dkv", True, 128): HeadsTile(32, 32, 4),
    ("dkv", True, 256): HeadsTile(16, 32, 8),
    ("fwd", False, 32): HeadsTile(16, 128, 8),
    ("fwd", False, 64): HeadsTile(16, 32, 8),
    ("dq", False, 32): HeadsTile(16, 128, 8),
    ("dq", False, 64): HeadsTile(16, 32, 8),
    ("dkv", False, 32): HeadsTile(16, 32, 8),
    ("dkv", False, 64): HeadsTile(16, 16, 8),
}

# the same, where tokens are taken in turn, free of spills with Triton 3.6, too; in 16 bits the largest tried of which a
# multiprocessor of sm_90 holds 16 warps, of heads wider than 64 8 warps. Not swept on a GPU; 257 tokens and heads of 80
# on an H200: docs/results/h200/run4/prompts.json
TILED_HEADS_TILES = {
    ("fwd", True, 32): HeadsTile(128, 32, 8),
    ("fwd", True, 64): HeadsTile(128, 32, 8),
    ("fwd", True, 128): HeadsTile(128, 32, 8),
    ("fwd", True, 256): HeadsTile(64, 32, 8),
    ("dq", True, 32): HeadsTile(64, 32, 4),
    ("dq", True, 64): HeadsTile(128, 32, 8),
    ("dq", True, 128): HeadsTile(64, 64, 8),
    ("dq", True, 256): HeadsTile(64, 32, 8),
    ("fwd", False, 32): HeadsTile(32, 32, 8),
    ("fwd", False, 64): HeadsTile(16, 64, 8),
    ("dq", False, 32): HeadsTile(32, 32, 8),
    ("dq", False, 64): HeadsTile(16, 16, 8),
}


def pad(n: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def can_fold(channels: int, tokens: int, size: int) -> bool:
    """Whether the folded kernels serve this; `size`: bytes of an element."""
    return channels % 8 == 0 and channels <= FOLDED_CHANNELS.get(size, 0) and 1 <= tokens <= FOLDED_TOKENS


def head_width_limit(size: int) -> int:
    """The widest head that the per-head kernels serve: dk and dv of a wider one in float32 spill registers."""
    return {2: 256, 4: 64}.get(size, 0)


def is_tiled(tokens: int, width: int, size: int) -> bool:
    """Whether the per-head kernels take a head's tokens in turn, since the softmax of all would not fit on the chip."""
    return tokens > HEADS_TILES["fwd", size == 2, pad(width, 32)].BLOCK_N


def heads_tile(kernel: str, queries: int, tokens: int, width: int, size: int) -> HeadsTile:
    """The per-head kernels' tile, cut to what there is: few tokens, and of narrow heads few queries."""
    tiles = TILED_HEADS_TILES if kernel != "dkv" and is_tiled(tokens, width, size) else HEADS_TILES
    tile = tiles[kernel, size == 2, pad(width, 32)]
    if tokens <= FEW_TOKENS:
        tile = tile._replace(BLOCK_N=min(tile.BLOCK_N, FEW_TOKENS))
        if queries <= SHORT.BLOCK_L and size == 2 and width <= 32:
            tile = SHORT
    return tile


def predict(route: str, queries: int, channels: int, tokens: int, heads: int, size: int, batch: int = BATCH) -> float:
    """Seconds of a forward by formula: launches, and the longest of bytes and products. `size`: bytes of an element.

    "folded": x in, y out, keys and values (H*N, C) written and read; "heads": LayerNorm, the query projection, the
    attention and the output projection with x each go to memory; keys and values come from the cache, for every 64
    queries.
    """
    x = queries * channels
    if route == "folded":
        launches, elements, flops, again = 5, 2 * x + 4 * heads * tokens * channels, 4 * x * heads * FOLDED_TOKENS, 0.0
    else:
        launches, elements, flops = 6, 9 * x, 4 * x * (channels + tokens)
        again = -(-queries // 64) * 2 * tokens * channels * size / CACHE_BANDWIDTH
    return launches * LAUNCH + batch * max(elements * size / BANDWIDTH, flops / RATE[size], again)


def choose_route(queries: int, channels: int, tokens: int, heads: int, size: int) -> str:
    """ "folded" or "heads", whichever is predicted to be faster at the batch of the paper."""
    if not can_fold(channels, tokens, size):
        return "heads"
    folded, by_heads = (predict(route, queries, channels, tokens, heads, size) for route in ("folded", "heads"))
    return "folded" if folded <= by_heads else "heads"
