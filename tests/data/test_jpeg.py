"""JPEG files as tensors: the same pixels and the same words as through Pillow."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ijepa_zoo.data.images import decode
from ijepa_zoo.data.jpeg import decode_pixels
from PIL import Image
from torchvision.transforms import functional as tv

from ijepa_zoo.data import jpeg, open_images
from ijepa_zoo.errors import ImageError

PHOTOS = Path(__file__).parents[2] / "examples" / "images" / "photos"


def picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 72), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return encoded(picture(), exif=exif)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is given to a decoder with the ways of torchcodec's, made of Pillow."""
    given: list[bytes] = []

    def decode_jpeg(content: bytes) -> torch.Tensor:
        given.append(content)
        try:
            return tv.pil_to_tensor(Image.open(io.BytesIO(content)))
        except OSError as error:
            raise RuntimeError(str(error)) from error

    monkeypatch.setattr(jpeg, "_torchcodec", lambda: decode_jpeg)
    return given


@pytest.mark.parametrize(
    "content", [encoded(picture()), encoded(picture(), progressive=True), with_orientation(1)]
)
def test_plain_files_become_tensors(decoder: list[bytes], content: bytes) -> None:
    pixels = decode_pixels(io.BytesIO(content))
    assert decoder == [content]
    assert torch.equal(pixels, tv.pil_to_tensor(decode(io.BytesIO(content))))


UNUSUAL = {
    "grey": encoded(picture().convert("L")),
    "CMYK": encoded(picture().convert("CMYK")),
    "turned": with_orientation(6),
    "PNG": encoded(picture(), "PNG"),
    "several pictures": encoded(picture(), "MPO", save_all=True, append_images=[picture()]),
    "more behind it": encoded(picture()) + b"\n",
}


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_files_are_left_to_pillow(decoder: list[bytes], kind: str) -> None:
    content = UNUSUAL[kind]
    image = decode_pixels(io.BytesIO(content))
    assert not decoder
    assert isinstance(image, Image.Image)
    assert image.tobytes() == decode(io.BytesIO(content)).tobytes()


BROKEN = {
    "empty": b"",
    "cut": encoded(picture())[:900],
    "cut in its header": encoded(picture())[:30],
    "too large": encoded(Image.new("RGB", (200, 200))),
    "text": b"\xff\xd8\xff text",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_have_pillows_reasons(decoder: list[bytes], kind: str) -> None:
    reasons = []
    for function in (decode, decode_pixels):
        with pytest.raises(ImageError) as error:
            function(io.BytesIO(BROKEN[kind]), 200 * 199)
        reasons.append(str(error.value))
    assert reasons[0] == reasons[1]


def test_damage_that_the_decoder_finds_is_judged_by_pillow(
    decoder: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = encoded(picture())

    def refuse(content: bytes) -> torch.Tensor:
        raise RuntimeError("damaged")

    monkeypatch.setattr(jpeg, "_torchcodec", lambda: refuse)
    assert isinstance(decode_pixels(io.BytesIO(content)), Image.Image)


def test_sets_read_tensors_where_asked(decoder: list[bytes], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    (tmp_path / "b.png").write_bytes(encoded(picture(), "PNG"))
    (tmp_path / "c.jpg").write_bytes(encoded(picture())[:900])
    images = open_images(tmp_path, tensors=True)
    assert isinstance(images.read(0), torch.Tensor)
    assert isinstance(images.read(1), Image.Image)
    with pytest.raises(ImageError, match="truncated"):
        images.read(2)
    for other in (open_images(tmp_path), open_images(tmp_path, in_chans=1, tensors=True)):
        assert isinstance(other.read(0), Image.Image)


def test_torchcodec_gives_pillows_pixels_also_of_damaged_files() -> None:
    if jpeg._torchcodec() is None:
        pytest.skip("torchcodec is not installed")
    rng = random.Random(0)
    whole = [encoded(picture(), **options) for options in OPTIONS]
    whole += [path.read_bytes() for path in sorted(PHOTOS.glob("*.jpg"))]
    tensors = 0
    for number in range(400):
        content = bytearray(whole[number % len(whole)])
        if number >= len(whole):
            rng.choice(DAMAGES)(content, rng)
        expected, found = (result(function, bytes(content)) for function in (decode, decode_pixels))
        assert type(expected) is type(found)
        assert torch.equal(expected, found) if torch.is_tensor(expected) else expected == found
        tensors += torch.is_tensor(found)
    assert tensors > 100


OPTIONS: list[dict[str, object]] = [
    *({}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}),
    *({"quality": 30, "optimize": True}, {"restart_marker_blocks": 3}),
]


def change_bytes(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 3, 20])):
        content[rng.randrange(2, len(content))] = rng.randrange(256)


def cut_out(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(2, len(content) - 2)
    del content[start : start + rng.choice([1, 7, 500])]
    content += b"\xff\xd9"


def cut_off(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(20, len(content)) :]
    content += rng.choice([b"", b"\xff\xd9", bytes(50)])


DAMAGES: list[Callable[[bytearray, random.Random], None]] = [change_bytes, cut_out, cut_off]


def result(function: Callable[..., object], content: bytes) -> torch.Tensor | str:
    try:
        pixels = function(io.BytesIO(content))
    except ImageError as error:
        return str(error)
    return pixels if isinstance(pixels, torch.Tensor) else tv.pil_to_tensor(pixels)
