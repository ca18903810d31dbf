"""The public names of the package."""

from .data.sources import open_images
from .data.transforms import create_transform
from .errors import UserError
from .extract import extract_features
from .features import FeatureExtractor
from .models.encoder import encode_visible
from .models.factory import create_ijepa, create_model, list_models
from .models.jepa import IJepa
from .predictions import predict
from .weights.export import export

__all__ = [
    "FeatureExtractor",
    "IJepa",
    "UserError",
    "create_ijepa",
    "create_model",
    "create_transform",
    "encode_visible",
    "export",
    "extract_features",
    "list_models",
    "open_images",
    "predict",
]
