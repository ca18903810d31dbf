"""Decoding of every kind of image, against pixels worked out by hand."""

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from ijepa_zoo.data.images import ImageReader, decode
from ijepa_zoo.data.items import Item
from PIL import Image, ImageFile

from ijepa_zoo.errors import ImageError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def pixels(file: io.BytesIO, **options: int) -> list[list[tuple[int, ...]]]:
    image = decode(file, **options)
    assert image.mode == "RGB"
    return [[tuple(map(int, p)) for p in row] for row in np.asarray(image)]


def grey(values: list[list[float]], dtype: str, kind: str = "TIFF") -> io.BytesIO:
    return encoded(Image.fromarray(np.array(values, dtype)), kind)


RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_greyscale_and_one_bit() -> None:
    assert pixels(encoded(Image.frombytes("L", (2, 1), b"\x07\xff"))) == [[(7,) * 3, (255,) * 3]]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(encoded(bits)) == [[(0, 0, 0), (255, 255, 255)]]


def test_palette_with_and_without_transparency() -> None:
    image = Image.frombytes("P", (2, 1), b"\x00\x01")
    image.putpalette([*RED, *BLUE])
    assert pixels(encoded(image)) == [[RED, BLUE]]
    assert pixels(encoded(image, transparency=1)) == [[RED, (255, 255, 255)]]
    assert pixels(encoded(image, "GIF", transparency=0)) == [[(255, 255, 255), BLUE]]


def test_alpha_is_laid_over_white() -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black, four fifths white
    assert pixels(encoded(image)) == [[(255, 255, 255), BLUE, (204, 204, 204)]]
    assert pixels(encoded(Image.new("LA", (1, 1), (100, 0)))) == [[(255, 255, 255)]]
    assert pixels(encoded(Image.new("LA", (1, 1), (100, 255)))) == [[(100, 100, 100)]]


def test_transparent_colour_of_an_rgb_png() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    assert pixels(encoded(image, transparency=RED)) == [[(255, 255, 255), BLUE]]


def test_cmyk() -> None:
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [[RED]]
    jpeg = pixels(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"))
    assert max(jpeg[0][0]) < 5  # black ink is black, not its negative


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(kind: str) -> None:
    values = grey([[0, 257, 32768, 65535]], "uint16", kind)
    assert [p[0] for p in pixels(values)[0]] == [0, 1, 128, 255]


def test_16_bit_big_endian_and_pgm() -> None:
    pgm = io.BytesIO(b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 25700))
    assert [p[0] for p in pixels(pgm)[0]] == [255, 100]


def test_32_bit_and_floating_point_greyscale() -> None:
    assert [p[0] for p in pixels(grey([[0, 65535]], "int32"))[0]] == [0, 255]
    assert [p[0] for p in pixels(grey([[-100, 0, 100]], "int32"))[0]] == [0, 128, 255]
    assert [p[0] for p in pixels(grey([[0, 0.2, 1]], "float32"))[0]] == [0, 51, 255]
    assert [p[0] for p in pixels(grey([[0, 100, 255]], "float32"))[0]] == [0, 100, 255]
    assert [p[0] for p in pixels(grey([[1000, 1500, 2000]], "float32"))[0]] == [0, 128, 255]
    with pytest.raises(ImageError, match="not finite"):
        decode(grey([[0, float("nan")]], "float32"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    """The stored array is what the camera wrote; the tag says where its row 0, column 0 belong."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 200, 120, 60  # bottom right stays 0
    stored = {  # EXIF 2.3: position of (row 0, column 0)
        1: upright,
        2: upright[:, ::-1],  # top right
        3: upright[::-1, ::-1],  # bottom right
        4: upright[::-1],  # bottom left
        5: upright.T,  # left top
        6: np.rot90(upright, 1),  # right top: shown after a turn clockwise
        7: upright[::-1, ::-1].T,  # right bottom
        8: np.rot90(upright, -1),  # left bottom
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    got = np.asarray(decode(encoded(image, kind, exif=exif, **options)))[..., 0]
    assert got.shape == upright.shape
    corners = got[4::8, 8::16].astype(int)
    np.testing.assert_allclose(corners, [[200, 120], [60, 0]], atol=8)


def test_broken_exif_leaves_the_pixels() -> None:
    file = encoded(Image.new("RGB", (1, 1), RED), exif=b"Exif\0\0MM\0\x2anonsense")
    assert pixels(file) == [[RED]]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_several(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert pixels(file)[0][0] == RED


def test_one_pixel() -> None:
    assert pixels(encoded(Image.new("RGB", (1, 1), BLUE), "BMP")) == [[BLUE]]


def reason(data: bytes, max_pixels: int = 10_000) -> str:
    with pytest.raises(ImageError) as caught:
        decode(io.BytesIO(data), max_pixels)
    assert "0x" not in str(caught.value)  # no addresses: a reason is the same in every run
    return str(caught.value)


def test_reasons() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    jpeg = encoded(Image.fromarray(noise), "JPEG").getvalue()
    assert reason(b"") == "empty file"
    assert reason(b"hello, this is text") == reason(b"\0" * 100)
    assert "not an image" in reason(b"hello, this is text")
    assert reason(jpeg[:-100]).startswith("truncated image")
    png = bytearray(encoded(Image.fromarray(noise)).getvalue())
    png[2000:2100] = bytes(100)
    assert reason(bytes(png)).startswith("broken image")


def test_every_damage_is_told() -> None:
    """Cut or altered anywhere, a file is decoded or refused; nothing else comes out."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000"):
        whole = encoded(image, kind).getvalue()
        for _ in range(40):
            data = bytearray(whole[: random.integers(1, len(whole) + 1)])
            places = random.integers(0, min(len(data), 200), 3)
            data[int(places[0])] = int(random.integers(256))
            data[int(places[1])] = int(random.integers(256))
            with contextlib.suppress(ImageError):
                assert decode(io.BytesIO(bytes(data)), 100_000).mode == "RGB"


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header asks for many pixels, a few kilobytes long."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(bytes(1_000_000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_pixel_limit_is_checked_in_the_header() -> None:
    assert "10,000,000,000 pixels, the limit is 10,000 " in reason(bomb(100_000, 100_000))
    assert "10,100 pixels" in reason(encoded(Image.new("L", (101, 100))).getvalue())
    assert decode(encoded(Image.new("L", (100, 100))), 10_000).size == (100, 100)


def test_pillow_is_left_as_it_was() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
        jpeg = encoded(Image.fromarray(noise), "JPEG").getvalue()
        assert reason(jpeg[:-100]).startswith("truncated image")  # whatever the process has set
        assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(encoded(Image.new("L", (100, 100))), 10_000)  # between Pillow's warning and error
    assert limit == Image.MAX_IMAGE_PIXELS


def test_unreadable_files(tmp_path: Path) -> None:
    reader = ImageReader()
    (tmp_path / "folder.jpg").mkdir()
    for path, expected in (
        (tmp_path / "absent.jpg", "cannot be read: No such file or directory"),
        (tmp_path / "folder.jpg", "not a regular file"),
        ("with\0nul.jpg", "cannot be read: a path cannot hold a NUL character"),
    ):
        with pytest.raises(ImageError) as caught:
            reader.read(Item(str(path)))
        assert str(caught.value) == expected


def test_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="not a regular file"):
        ImageReader().read(Item(str(tmp_path / "pipe.jpg")))


def test_member_that_claims_too_much_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    item = Item("a.tar/a.png", shard=str(tmp_path / "a.tar"), offset=512, size=1 << 40)
    with pytest.raises(ImageError, match="too large: 1,099,511,627,776 bytes"):
        ImageReader().read(item)
