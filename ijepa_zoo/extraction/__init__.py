"""Features of many images into one file."""

from ..errors import RunError
from .run import ExtractionReport, extract_features

__all__ = ["ExtractionReport", "RunError", "extract_features"]
