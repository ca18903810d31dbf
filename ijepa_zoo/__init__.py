"""I-JEPA for people who use it: encoders, weights, features. Importing registers the models."""

from .models.factory import create_ijepa, create_model, list_models
from .models.jepa import IJepa
from .weights.export import export

__version__ = "0.1.0"

__all__ = ["IJepa", "create_ijepa", "create_model", "export", "list_models"]
