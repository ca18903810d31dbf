"""The paper's probes: metrics of encoders on labeled data, compared with the paper's."""

from ..errors import DataError, RunError
from .attentive import evaluate_attentive
from .dense import evaluate_dense_depth, evaluate_segmentation
from .finetune import evaluate_finetune
from .knn import evaluate_knn
from .linear import evaluate_linear
from .logreg import evaluate_logreg
from .models import EvalModel, open_model
from .probe import EvalConfig, HeadsConfig
from .results import Result, read_result, write_report
from .saved_head import evaluate_head
from .tasks import TASKS, Protocol, Task, find_task

__all__ = [
    "TASKS",
    "DataError",
    "EvalConfig",
    "EvalModel",
    "HeadsConfig",
    "Protocol",
    "Result",
    "RunError",
    "Task",
    "evaluate_attentive",
    "evaluate_dense_depth",
    "evaluate_finetune",
    "evaluate_head",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_logreg",
    "evaluate_segmentation",
    "find_task",
    "open_model",
    "read_result",
    "write_report",
]
