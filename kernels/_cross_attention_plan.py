"""Which route of cross-attention, and with which tiles: tables and a cost model to be read, no tuning at run time.

The tiles are the largest that `make gate` finds free of spills on every target. The cost model predicts; nothing in it
was measured.
"""

from typing import NamedTuple

MAX_TOKENS, FEW_TOKENS = 128, 32
FOLDED_TOKENS, FOLDED_CHANNELS = 32, {2: 256, 4: 64}

# of the card that the model has in mind, H200-class: copy bandwidth in bytes/s, an attainable rate of 16-bit and of
# float32 products in FLOP/s, seconds from one kernel to the next, and the batch of the paper
BANDWIDTH, RATE, LAUNCH, BATCH = 4.3e12, {2: 400e12, 4: 30e12}, 2e-6, 128


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
    ("fwd", True, 64): FoldedTile(64, 4, 8),
    ("fwd", True, 128): FoldedTile(64, 2, 8),
    ("fwd", True, 256): FoldedTile(32, 2, 8),
    ("dx", True, 64): FoldedTile(64, 2, 8),
    ("dx", True, 128): FoldedTile(64, 2, 8),
    ("dx", True, 256): FoldedTile(32, 2, 8),
    ("dkv", True, 64): FoldedTile(32, 1, 4),
    ("dkv", True, 128): FoldedTile(32, 1, 4),
    ("dkv", True, 256): FoldedTile(16, 1, 8),
    ("fwd", False, 64): FoldedTile(16, 1, 4),
    ("dx", False, 64): FoldedTile(16, 1, 8),
    ("dkv", False, 64): FoldedTile(16, 1, 8),
}

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


def pad(n: int, least: int) -> int:
    """The next power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def can_fold(channels: int, tokens: int, size: int) -> bool:
    """Whether the folded kernels serve this; `size`: bytes of an element."""
    return channels % 8 == 0 and channels <= FOLDED_CHANNELS.get(size, 0) and 1 <= tokens <= FOLDED_TOKENS


def head_width_limit(tokens: int, size: int) -> int:
    """The widest head that the per-head kernels serve: of a wider one in float32, many tokens spill registers."""
    return {2: 256, 4: 64 if tokens <= FEW_TOKENS else 32}.get(size, 0)


def predict(route: str, queries: int, channels: int, tokens: int, heads: int, size: int, batch: int = BATCH) -> float:
    """Seconds of a forward by formula: launches, and the longer of bytes and products. `size`: bytes of an element.

    "folded": x in, y out, keys and values (H*N, C) written and read; "folded once": read only, folded before;
    "heads": LayerNorm, the query projection, the attention and the output projection with x each go to memory.
    """
    x, folded = queries * channels, heads * tokens * channels
    if route == "heads":
        launches, elements, flops = 6, 9 * x, 4 * x * (channels + tokens)
    else:
        launches, elements = (5, 2 * x + 4 * folded) if route == "folded" else (1, 2 * x + 2 * folded)
        flops = 4 * x * heads * FOLDED_TOKENS
    return launches * LAUNCH + batch * max(elements * size / BANDWIDTH, flops / RATE[size])


def choose_route(queries: int, channels: int, tokens: int, heads: int, size: int) -> str:
    """ "folded" or "heads", whichever is predicted to be faster at the batch of the paper."""
    if not can_fold(channels, tokens, size):
        return "heads"
    return min("folded", "heads", key=lambda r: predict(r, queries, channels, tokens, heads, size))
