"""What every metric asks of codes, once: finite numbers, constant where only rounding moves them, in range."""

import numpy as np

from encdiff.errors import InputError

ROUNDING = 4  # units of the last place; a code that varies by no more is constant
EXPONENT = 100  # columns are scaled, by powers of two, until their largest number lies in 2^-100 .. 2^100
OFFSET = 2.0**20  # a column that lies so many times its range away from 0 is moved there
TREES = 10  # trees get columns whose range is about 2^10


def check_codes(name: str, codes: np.ndarray, rows: int, least: int = 1) -> np.ndarray:
    """`codes` as float64; InputError unless it is (rows, N) with N >= least, of finite real numbers.

    A column that is constant but for rounding in its own type becomes constant: it holds no information.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[0] != rows or codes.shape[1] < least:
        raise InputError(f"{name} has shape {codes.shape}; it must be ({rows}, N) with N >= {least}")
    if codes.dtype.kind not in "fiu":
        raise InputError(f"{name} has dtype {codes.dtype}; it must hold real numbers")
    unit = max(np.finfo(codes.dtype).eps, np.finfo(float).eps) if codes.dtype.kind == "f" else 0
    with np.errstate(over="ignore"):
        codes = codes.astype(np.float64, copy=False)
    if not np.isfinite(codes).all():
        raise InputError(f"{name} holds NaN or infinite values; all must be finite")
    if not rows:
        return codes
    low, high = codes.min(axis=0), codes.max(axis=0)
    constant = high / 2 - low / 2 <= ROUNDING / 2 * unit * np.maximum(abs(low), abs(high))
    return np.where(constant, low, codes) if (constant & (low < high)).any() else codes


def settle(*parts: np.ndarray) -> list[np.ndarray]:
    """Parts of one set of codes, float64 (n, N) each, scaled and moved alike where their numbers are extreme.

    Sums of squares then neither overflow nor vanish, and the range of a column is not lost in its distance from 0.
    Ordinary columns stay as they are. Scaling is exact; what a metric makes of a code's scale holds within 2^-100 ..
    2^100.
    """
    most = np.max([abs(part).max(axis=0) for part in parts], axis=0)
    exponent = np.frexp(most)[1]
    shift = np.where(most > 0, np.clip(exponent, -EXPONENT, EXPONENT) - exponent, 0)
    if shift.any():
        parts, most = tuple(np.ldexp(part, shift) for part in parts), np.ldexp(most, shift)
    low, high = np.min([p.min(axis=0) for p in parts], axis=0), np.max([p.max(axis=0) for p in parts], axis=0)
    far = (most > OFFSET * (high - low)) & ((high > low) | (most > OFFSET))
    return [part - np.where(far, low, 0) for part in parts] if far.any() else list(parts)


def for_trees(codes: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """Codes for scikit-learn's trees, which compute in float32 and take differences below 1e-7 as none.

    By the range of `codes`, float64 (n, N), all parts are scaled by powers of two, and moved where their distance from
    0 would cost float32 digits.
    """
    low, high = codes.min(axis=0), codes.max(axis=0)
    spread = high - low
    far = np.maximum(abs(low), abs(high)) > 2 * spread
    centre = np.where(far, (low + high) / 2, 0)
    shift = np.where(spread > 0, TREES - np.frexp(spread)[1], 0)
    bound = np.finfo(np.float32).max / 4
    return [np.clip(np.ldexp(part - centre, shift), -bound, bound) for part in (codes, *others)]
