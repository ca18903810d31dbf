"""Models as files that servers run without this package: ONNX and torch.export."""

from .export import ServingError, export_graph

__all__ = ["ServingError", "export_graph"]
