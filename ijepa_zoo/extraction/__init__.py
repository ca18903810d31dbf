"""Features of many images into one file."""

from .claim import ExtractionError
from .run import ExtractionReport, extract_features

__all__ = ["ExtractionError", "ExtractionReport", "extract_features"]
