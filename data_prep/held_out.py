"""Which documents of a source are held out for validation: a pure function of (seed, source, position). Owns that choice; refuses nothing."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def held_out(seed: int, name: str, first: int, count: int, fraction: float) -> NDArray[np.bool_]:
    """Which of the documents first .. first + count - 1 of a source belong to validation: a hash of (seed, name, position) below the fraction.

    splitmix64's finaliser (Steele, Lea, Flood 2014) over the position, from a start drawn from seed and name.
    """
    if fraction == 0:
        return np.zeros(count, dtype=bool)
    key = int.from_bytes(hashlib.sha256(f"held out\0{seed}\0{name}".encode()).digest()[:8], "little")
    with np.errstate(over="ignore"):
        mixed = (np.arange(first, first + count, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed < np.uint64(int(fraction * (1 << 64)))
