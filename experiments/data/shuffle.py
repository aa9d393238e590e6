"""A pseudo-random permutation with random access: constant memory, any index at any time.

A Feistel network permutes the next even power of two, and cycle-walking (applying it again while
the result is too large) restricts it to the size asked for. grain's `index_shuffle` does the same
over a domain of fixed least size, which costs milliseconds per index when there are few of them.

References:
    Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, §4 and §5.
    Steele et al., "Fast Splittable Pseudorandom Number Generators", 2014 (the mixing function).
"""

import numpy as np

ROUNDS = 8


def permute(index: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Where a bijection of `range(size)` sends each index.

    Args:
        index: integers [n], each in `range(size)`.
        size: at least 1, at most 2**62.
        keys: uint64 [ROUNDS]; other keys, another bijection.

    Returns:
        int64 [n].
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    position = np.atleast_1d(index).astype(np.uint64)
    outside = np.ones(position.shape, bool)
    while outside.any():
        position[outside] = _feistel(position[outside], half, keys)
        outside = position >= np.uint64(size)
    return position.astype(np.int64)


def _feistel(position: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = position >> half, position & mask
    for key in keys:
        left, right = right, left ^ (_mix(right + key) & mask)
    return (left << half) | right


def _mix(value: np.ndarray) -> np.ndarray:
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
