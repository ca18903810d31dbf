"""The only place where seeds are mixed: every random number is a function of named integers.

A generator is made from a user's seed, a `Stream` and counters such as the step, so nothing
depends on what ran before: any step can be repeated, skipped or resumed on its own.
"""

from __future__ import annotations

import hashlib
import struct
from enum import IntEnum

import numpy as np
import torch

_UINT64 = 2**64


class Stream(IntEnum):
    """Purpose of random numbers; as a key, it keeps two purposes from sharing numbers."""

    MASKS = 1
    DATA_ORDER = 2
    CROPS = 3
    SCENES = 4
    INIT = 5
    PROBE = 6
    HELD_OUT = 7
    REPLACE = 8
    EVAL_ORDER = 9
    EVAL_AUGMENT = 10
    EVAL_SPLIT = 11
    EVAL_INIT = 12


def fold(*keys: int) -> int:
    """Hash integers, modulo 2**64, into a seed in [0, 2**64).

    The order and the number of keys matter. The hash is BLAKE2b, the same on every platform and
    with every version of Python, NumPy and torch.
    """
    packed = struct.pack(f"<{len(keys)}Q", *(int(key) % _UINT64 for key in keys))
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def numpy_generator(*keys: int) -> np.random.Generator:
    """A fresh NumPy generator (Philox, 64-bit key) that depends on `keys` alone; see `fold`."""
    return np.random.Generator(np.random.Philox(key=fold(*keys)))


def torch_generator(*keys: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch generator on `device` that depends on `keys` alone; see `fold`."""
    return torch.Generator(device=device).manual_seed(fold(*keys))
