"""I-JEPA as timm models: encoders, weights, features. Importing it registers the models."""

import sys
from importlib import import_module
from os.path import basename
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# The command `ijepa-zoo` imports torch and timm late, so that `--help` and usage errors are fast.
if TYPE_CHECKING or basename("".join(sys.argv[:1])) not in ("ijepa-zoo", "ijepa-zoo.exe"):
    from .api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        api = import_module(".api", __name__)
        if name not in api.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(api, name)
