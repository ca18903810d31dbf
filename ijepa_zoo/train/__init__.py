"""Self-supervised pretraining."""

from ..rendezvous import ProcessError
from .config import PretrainConfig
from .dry_run import dry_run
from .export import export_run
from .folder import RunError
from .plot import plot_run
from .run import pretrain
from .settings import explained, load_config, override, recipe_table
from .stopping import Interrupted
from .trainer import NonFiniteLossError, Trainer

__all__ = [
    "Interrupted",
    "NonFiniteLossError",
    "PretrainConfig",
    "ProcessError",
    "RunError",
    "Trainer",
    "dry_run",
    "explained",
    "export_run",
    "load_config",
    "override",
    "plot_run",
    "pretrain",
    "recipe_table",
]
