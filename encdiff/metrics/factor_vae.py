"""FactorVAE score (Kim & Mnih 2018, arXiv 1802.05983, section 4)."""

from collections.abc import Callable, Sequence

import numpy as np

from encdiff.errors import InputError

ENCODE_ROWS = 65_536  # rows encoded at once: bounds memory, does not change the result


def factor_vae_score(
    codes: np.ndarray | Callable[[np.ndarray], np.ndarray],
    factor_sizes: Sequence[int],
    *,
    num_variance: int = 10_000,
    num_train: int = 10_000,
    num_eval: int = 5_000,
    batch_size: int = 64,
    threshold: float = 0.05,
    seed: int = 0,
) -> dict:
    """Accuracy of a majority vote that names the fixed factor from the code dimension that varies least.

    codes: (prod(factor_sizes), N) floats, one row per image of the complete grid, last factor fastest; or a function of
    factors int64 (m, F) that returns codes (m, N). Dimensions whose standard deviation over `num_variance` samples is
    below `threshold` take no part; without any other dimension the score is 0.

    Factors are drawn in the order of the standard library of the field, one `RandomState(seed)` for everything, so that
    a seed gives its votes. Returns `train_accuracy`, `eval_accuracy` (the score, in [0, 1]) and `num_active_dims`.
    Raises InputError for codes that are not finite or do not match the grid.
    """
    sizes = check_factor_sizes(factor_sizes)
    check_at_least(2, num_variance=num_variance, batch_size=batch_size)
    check_at_least(1, num_train=num_train, num_eval=num_eval)
    if not threshold >= 0:
        raise InputError(f"threshold is {threshold!r}; it must be at least 0")
    encode = codes if callable(codes) else _grid_lookup(codes, sizes)
    rng = np.random.RandomState(seed)
    z = _encode(encode, sample_factors(rng, sizes, num_variance))
    variance = z.var(axis=0, ddof=1)
    active = np.flatnonzero((np.sqrt(variance) >= threshold) & (np.ptp(z, axis=0) > 0))
    if active.size == 0:
        return {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0}
    train = _votes(encode, rng, sizes, num_train, batch_size, variance, active)
    test = _votes(encode, rng, sizes, num_eval, batch_size, variance, active)
    majority = train.argmax(axis=0), np.arange(active.size)  # the factor that each dimension stands for
    return {
        "train_accuracy": float(train[majority].sum() / num_train),
        "eval_accuracy": float(test[majority].sum() / num_eval),
        "num_active_dims": int(active.size),
    }


def sample_factors(rng: np.random.RandomState, factor_sizes: Sequence[int], n: int) -> np.ndarray:
    """int64 (n, F), uniform; factor by factor, which is the order of the field's standard library."""
    return np.stack([rng.randint(size, size=n) for size in factor_sizes], axis=1).astype(np.int64, copy=False)


def check_factor_sizes(factor_sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes as a tuple; InputError unless there are at least two factors, each with at least two values."""
    sizes = tuple(int(size) for size in np.atleast_1d(factor_sizes))
    if len(sizes) < 2 or min(sizes) < 2:
        raise InputError(f"factor_sizes is {sizes}; it must hold at least two factors of at least two values each")
    return sizes


def check_codes(name: str, codes: np.ndarray, rows: int) -> np.ndarray:
    """`codes` as float32; InputError unless it is (rows, N) with N >= 1, of finite real numbers."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[0] != rows or codes.shape[1] < 1:
        raise InputError(f"{name} has shape {codes.shape}; it must be ({rows}, N) with N >= 1")
    if codes.dtype.kind not in "fiu":
        raise InputError(f"{name} has dtype {codes.dtype}; it must hold real numbers")
    with np.errstate(over="ignore"):
        codes = codes.astype(np.float32, copy=False)
    if not np.isfinite(codes).all():
        raise InputError(f"{name} holds NaN or infinite values; all must be finite in float32")
    return codes


def check_at_least(least: int, **values: int) -> None:
    """InputError for the first of `values` that is not an integer of at least `least`."""
    for name, value in values.items():
        if not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"{name} is {value!r}; it must be an integer of at least {least}")


def _grid_lookup(codes: np.ndarray, sizes: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    codes = check_codes("codes", codes, int(np.prod(sizes)))
    return lambda factors: codes[np.ravel_multi_index(factors.T, sizes)]


def _encode(encode: Callable[[np.ndarray], np.ndarray], factors: np.ndarray) -> np.ndarray:
    return check_codes("codes", encode(factors), len(factors)).astype(np.float64)


def _votes(encode, rng, sizes, num_votes, batch_size, variance, active) -> np.ndarray:
    """int64 (F, active dims): how often a dimension varied least while a factor was fixed."""
    counts = np.zeros((len(sizes), active.size), np.int64)
    step = max(1, ENCODE_ROWS // batch_size)
    for start in range(0, num_votes, step):
        fixed, factors = _draw(rng, sizes, min(step, num_votes - start), batch_size)
        z = _encode(encode, factors.reshape(-1, len(sizes))).reshape(len(fixed), batch_size, -1)
        least = (z[..., active].var(axis=1, ddof=1) / variance[active]).argmin(axis=1)
        np.add.at(counts, (fixed, least), 1)
    return counts


def _draw(rng, sizes, num_votes, batch_size) -> tuple[np.ndarray, np.ndarray]:
    """Fixed factor (votes,) and factors (votes, batch_size, F) that share its value, that of their first row."""
    fixed = np.empty(num_votes, np.int64)
    factors = np.empty((num_votes, len(sizes), batch_size), np.int64)
    for vote in range(num_votes):  # only the draws, in their published order; the arithmetic is batched
        fixed[vote] = rng.randint(len(sizes))
        for k, size in enumerate(sizes):
            factors[vote, k] = rng.randint(size, size=batch_size)
    votes = np.arange(num_votes)
    factors[votes, fixed] = factors[votes, fixed, :1]
    return fixed, factors.transpose(0, 2, 1)
