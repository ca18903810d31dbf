"""Measuring this machine, and other libraries beside this one on the same work."""

from .crops import data
from .folder_features import features
from .growth import scaling
from .head_grid import eval
from .loading import load
from .result import BenchResult, DisagreementError
from .sampling import masks
from .saving import checkpoint
from .training import train

__all__ = [
    "BenchResult",
    "DisagreementError",
    "checkpoint",
    "data",
    "eval",
    "features",
    "load",
    "masks",
    "scaling",
    "train",
]
