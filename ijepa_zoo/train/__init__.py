"""Self-supervised pretraining."""

from .config import PretrainConfig
from .trainer import Trainer, pretrain

__all__ = ["PretrainConfig", "Trainer", "pretrain"]
