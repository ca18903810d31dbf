"""Models as files that servers run without this package: ONNX and torch.export."""

from ..errors import RunError
from .export import export_graph

__all__ = ["RunError", "export_graph"]
