"""Checks of data and options of dense depth, before any work."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from ..data.dense import DenseData, DenseDataset
from ..errors import DataError, ImageError, SettingsError
from .depth_metrics import MIN_DEPTH, valid_pixels
from .depth_training import DepthProtocol
from .words import option

_TRIED = 20  # pairs that are read before the work, until one can be


def check_range(max_depth: float | None) -> None:
    """Refuse a range that holds no depth.

    Args:
        max_depth: Farther pixels do not count; None: not given.

    Raises:
        ValueError: It is too small, or not finite.
    """
    if max_depth is not None and not MIN_DEPTH < max_depth < math.inf:
        raise SettingsError(
            f"{option('max_depth')} is {max_depth:g}: depths from {MIN_DEPTH:g} to it count, so "
            "give a larger one, such as 10"
        )


def check_pairs(protocol: DepthProtocol, pairs: DenseData, limit: float, world: int) -> None:
    """Refuse what would fail later, or give figures without a meaning.

    Args:
        protocol: Settings.
        pairs: The data.
        limit: Farther pixels do not count.
        world: Number of processes.

    Raises:
        DataError: There are too few pairs, or none that can be read, or no pixel counts.
        ValueError: A batch cannot be shared, or there is no epoch.
    """
    if protocol.epochs < 1 or protocol.batch_size < 1 or protocol.batch_size % world:
        raise SettingsError(
            f"epochs is {protocol.epochs}, batch_size {protocol.batch_size} and processes are "
            f"{world}: at least one epoch, and a batch that the processes can share equally"
        )
    if len(pairs.train) < 4 or not len(pairs.test):
        raise DataError(f"{len(pairs.train)} training and {len(pairs.test)} test pairs: at least "
                         "four and one are needed")  # fmt: skip
    for data in (pairs.train, pairs.test):
        depth = _first_depth(data)
        valid = valid_pixels(torch.from_numpy(depth), limit, pairs.crop)
        if not valid.any():
            raise DataError(
                f"no pixel of the depth map of '{data.names[0]}' counts: its depths span "
                f"{depth.min():g} to {depth.max():g}, and those from 0.001 to {limit:g} count. "
                f"Give the units with {option('depth_scale')}, the range with "
                f"{option('max_depth')}"
            )


def _first_depth(data: DenseDataset) -> npt.NDArray[np.float32]:
    """The first depth map that can be read, with its image."""
    reason = ""
    for index in range(min(len(data), _TRIED)):
        try:
            return data[index][1]
        except ImageError as error:
            reason = reason or f"'{data.names[index]}': {error}"
    raise DataError(f"none of the first {min(len(data), _TRIED)} pairs can be read; {reason}")
