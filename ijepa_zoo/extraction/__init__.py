"""Features of many images into one file."""

from .run import ExtractionReport, extract_features

__all__ = ["ExtractionReport", "extract_features"]
