"""Batches of decoded images of one fixed shape, made in loader workers."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .images import MAX_PIXELS, ImageError, ImageReader
from .items import Item


class ImageBatches(Dataset[tuple[Tensor, list[str | None]]]):
    """Batch ``b`` holds items ``b * batch_size`` to ``(b + 1) * batch_size``, each in its own slot.

    Slots of broken images and those past the last item hold zeros: an image meets the same slot
    and the same shape whatever its neighbours are, so its features are the same to the last bit.

    Args:
        items: What to decode.
        transform: RGB image to uint8 ``[3, H, W]``.
        batch_size: Slots of a batch.
        size: ``(height, width)`` of the transformed images.
        max_pixels: Limit for a single image.
    """

    def __init__(
        self,
        items: Sequence[Item],
        transform: Callable[[Image.Image], Tensor],
        batch_size: int,
        size: tuple[int, int],
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.items = items
        self.transform = transform
        self.batch_size = batch_size
        self.size = size
        self.reader = ImageReader(max_pixels)

    def __len__(self) -> int:
        return -(-len(self.items) // self.batch_size)

    def __getitem__(self, batch: int) -> tuple[Tensor, list[str | None]]:
        """Decode one batch.

        Returns:
            Images, uint8 ``[batch_size, 3, H, W]``, and for each *item* of the batch None or the
            reason why it could not be decoded.
        """
        first = batch * self.batch_size
        images = torch.zeros(self.batch_size, 3, *self.size, dtype=torch.uint8)
        errors: list[str | None] = []
        for slot, item in enumerate(self.items[first : first + self.batch_size]):
            try:
                images[slot] = self.transform(self.reader.read(item))
                errors.append(None)
            except ImageError as error:
                errors.append(str(error))
        return images, errors
