"""Self-supervised pretraining."""

from ..errors import DistributedError, RunError
from .config import PretrainConfig, describe_config, load_config, override, recipe_table
from .dry_run import dry_run
from .export import export_run, load_run
from .plot import plot_run
from .run import Interrupted, pretrain
from .trainer import NonFiniteLossError, Trainer

__all__ = [
    "DistributedError",
    "Interrupted",
    "NonFiniteLossError",
    "PretrainConfig",
    "RunError",
    "Trainer",
    "describe_config",
    "dry_run",
    "export_run",
    "load_config",
    "load_run",
    "override",
    "plot_run",
    "pretrain",
    "recipe_table",
]
