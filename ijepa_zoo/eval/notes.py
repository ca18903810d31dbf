"""Notes of a result: what a reader must know of images that could not be used."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np
import torch

from ..data.datasets import Targets
from ..distributed import Distributed
from .sets import EvalSet
from .words import counted, some

CACHED_AS_IS = (
    "cached: each image and its mirror image are encoded once, as the protocol has them (its only "
    "random view is the flip)"
)
_FEW = 100  # images to choose by that deserve a warning: their accuracies come in whole points


def few_to_choose(number: int) -> list[str]:
    """A note where few images choose the head; none where there are enough, or none at all."""
    if not 0 < number < _FEW:
        return []
    return [
        f"chosen by {counted(number, 'image')} only: with another seed another choice is likely"
    ]


def of_all_processes(texts: Mapping[str, str], distributed: Distributed) -> dict[str, str]:
    """The texts of all processes; every process must call this."""
    mine = torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)
    sizes = distributed.all_gather(torch.tensor([len(mine)]))
    padded = torch.zeros(1, int(sizes.max()), dtype=torch.uint8)
    padded[0, : len(mine)] = mine
    found: dict[str, str] = {}
    for row, size in zip(distributed.all_gather(padded), sizes.tolist()):
        found |= json.loads(bytes(row[:size].tolist()))
    return found


def undecoded(broken: Mapping[str, str], what: str = "image") -> list[str]:
    """A note on what could not be decoded; none where there is none.

    Args:
        broken: Names and reasons, of all processes.
        what: What it is.
    """
    if not broken:
        return []
    named = some([f"{name}: {reason}" for name, reason in sorted(broken.items())])
    return [f"{counted(len(broken), what)} could not be decoded ({named})"]


def lost_classes(train: EvalSet, rows: Targets, broken: Mapping[str, str]) -> list[str]:
    """A note on classes of which no training image is left.

    Args:
        train: Training set.
        rows: Numbers of its images that are trained on.
        broken: Names and reasons of those that could not be decoded, of all processes.
    """
    if not broken:
        return []  # of a million images no names are asked for
    good = np.array([train.images.name(row) not in broken for row in rows.tolist()], np.bool_)
    left = train.class_sizes(rows[good])
    lost = [f"'{train.classes[k]}'" for k in np.flatnonzero(left == 0).tolist()]
    if not lost:
        return []
    return [
        f"no image to train on could be decoded of {len(lost)} of {len(train.classes)} classes "
        f"({some(lost)}): nothing is known of them, and no test image is ever taken for one"
    ]
