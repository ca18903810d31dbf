"""Images from any source, as map-style datasets."""

from .datasets import ImageDataset
from .decode import Decoder
from .sources import open_images

__all__ = ["Decoder", "ImageDataset", "open_images"]
