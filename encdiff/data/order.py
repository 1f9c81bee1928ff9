"""A random order of any length that takes no memory: position i of 10^12 is found by itself, as any other."""

from __future__ import annotations

import hashlib

import numpy as np

from encdiff.errors import InputError

ROUNDS = 8  # of the network; four already look random to what knows no key (Luby and Rackoff, 1988)
MOST = 2**62  # positions: what int64 holds with room to spare
MULTIPLIERS = np.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], np.uint64)  # of splitmix64, which mixes 64 bits


class KeyedPermutation:
    """A permutation of range(n), 1 <= n <= 2^62, that seed and epoch alone decide; no array of it is ever made.

    `permutation[positions]` are the indices at integer positions of any shape, as int64, and `inverse(indices)` the
    positions of indices. A Feistel network of 8 rounds permutes the numbers of as many bits as n - 1 has; one that is
    then above n - 1 goes through it again until it does not (cycle walking: less than twice on average, n > 3).
    InputError for n, a seed or an epoch out of range, and for positions that are no integers in 0..n-1.
    """

    def __init__(self, n: int, seed: int, epoch: int = 0):
        if not 1 <= n <= MOST:
            raise InputError(f"n: {n}; must lie in 1..2^62")
        if min(seed, epoch) < 0:
            raise InputError(f"seed and epoch: {seed} and {epoch}; must be at least 0")
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low, self._high = np.uint64(bits // 2), np.uint64(bits - bits // 2)  # bits of the two halves
        digest = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)  # one for each round

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: np.ndarray | int) -> np.ndarray:
        return self._walk(positions, "positions", self._forward)

    def inverse(self, indices: np.ndarray | int) -> np.ndarray:
        """int64 positions of integer indices, of the same shape."""
        return self._walk(indices, "indices", self._backward)

    def _walk(self, numbers, name: str, network) -> np.ndarray:
        given = np.asarray(numbers)
        if given.size and given.dtype.kind not in "iu":
            raise InputError(f"{name}: {given.dtype}; must be integers")
        if given.size and (given.min() < 0 or given.max() >= self.n):
            raise InputError(f"{name}: {given.min()}..{given.max()}; must lie in 0..{self.n - 1}")
        out = network(given.astype(np.uint64).ravel())
        outside = np.flatnonzero(out >= self.n)
        while outside.size:
            again = network(out[outside])
            out[outside] = again
            outside = outside[again >= self.n]
        return out.astype(np.int64).reshape(given.shape)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        high, low = x >> self._low, x & self._ones(self._low)
        for one, two in self._keys.reshape(-1, 2):
            high ^= _mix(low, one) >> (np.uint64(64) - self._high)
            low ^= _mix(high, two) >> (np.uint64(64) - self._low)
        return high << self._low | low

    def _backward(self, x: np.ndarray) -> np.ndarray:
        high, low = x >> self._low, x & self._ones(self._low)
        for one, two in self._keys.reshape(-1, 2)[::-1]:
            low ^= _mix(high, two) >> (np.uint64(64) - self._low)
            high ^= _mix(low, one) >> (np.uint64(64) - self._high)
        return high << self._low | low

    @staticmethod
    def _ones(bits: np.uint64) -> np.uint64:
        return (np.uint64(1) << bits) - np.uint64(1)


def _mix(half: np.ndarray, key: np.uint64) -> np.ndarray:
    """uint64 of which every bit depends on every bit of `half`, the upper ones most; sums and products wrap around."""
    mixed = half + key
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= multiplier
    return mixed
