"""One file of the input, as the listing found it."""

import os
from dataclasses import dataclass

IMAGE_SUFFIXES = frozenset(
    (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib"),
        *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".ico", ".tga", ".qoi"),
        *(".avif", ".heic", ".heif"),  # decoded where the installed Pillow can
    )
)


@dataclass(frozen=True, slots=True)
class Item:
    """One file of the input.

    Attributes:
        path: Path as shown in the index; ``shard.tar/inner/name.jpg`` for a member of a shard.
        label: Name of the folder that holds it below the input, or a shard's ``.cls`` text.
        shard: The tar file that holds it, or None for a file of its own.
        offset: First byte of the member's data in the (uncompressed) shard.
        size: Bytes of the member's data.
        problem: Why it cannot be read, where that is known from the listing.
        skipped: Why it is not meant to be read; such an item is no failure.
    """

    path: str
    label: str | None = None
    shard: str | None = None
    offset: int = 0
    size: int = 0
    problem: str | None = None
    skipped: str | None = None


def is_image_name(name: str) -> bool:
    """Whether a file name ends like an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
