"""The paper's probes: figures of frozen encoders on labelled data, beside the paper's own."""

from .cache import CacheError
from .dense_depth import evaluate_dense_depth
from .epoch_state import StateError
from .finetune import evaluate_finetune
from .linear import evaluate_linear
from .lowshot import evaluate_lowshot
from .models import Subject, open_model
from .nearest import evaluate_knn
from .report import write_report
from .result import Result, ResultError
from .result_files import read_result
from .runs import EvaluationError
from .tasks import TASKS, Protocol, Task, find_task

__all__ = [
    "TASKS",
    "CacheError",
    "EvaluationError",
    "Protocol",
    "Result",
    "ResultError",
    "StateError",
    "Subject",
    "Task",
    "evaluate_dense_depth",
    "evaluate_finetune",
    "evaluate_knn",
    "evaluate_linear",
    "evaluate_lowshot",
    "find_task",
    "open_model",
    "read_result",
    "write_report",
]
