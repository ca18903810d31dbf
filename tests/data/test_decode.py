"""Decoding of every kind of image, against pixels worked out by hand or by plain Pillow."""

import contextlib
import io
import random
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inputs import encoded, noise
from PIL import Image, ImageFile
from torchvision.transforms.functional import pil_to_tensor

from ijepa_zoo.data import Decoder, decode
from ijepa_zoo.errors import DataError, ImageError, MissingPackageError, SettingsError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PHOTOS = Path(__file__).parents[2] / "examples" / "images" / "photos"


def first_row(content, **options):
    image = Decoder(**options)(content)
    assert image.mode == "RGB"
    return [tuple(map(int, pixel)) for pixel in np.asarray(image)[0]]


def grey(values, dtype, kind="TIFF"):
    return encoded(Image.fromarray(np.array([values], dtype)), kind)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bytes(width, height, depth, kind, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def png16(values):
    """A PNG of 16 bits, which Pillow cannot write in color."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_bytes(width, height, 16, {3: 2, 4: 6}[channels], rows)


def tiff(values, **options):
    file = io.BytesIO()
    writer = pytest.importorskip("tifffile")
    writer.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_plain_files_are_pillows(kind):
    content = encoded(Image.fromarray(noise(20, 30)), kind)
    theirs = Image.open(io.BytesIO(content))
    assert Decoder()(content).tobytes() == theirs.tobytes()
    assert Decoder(in_chans=1)(content).tobytes() == theirs.convert("L").tobytes()


def _palette():
    palette = Image.frombytes("P", (2, 1), b"\x00\x01")
    palette.putpalette([*RED, *BLUE])
    return palette


def _alpha():
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black, four fifths white
    return image


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.frombytes("L", (2, 1), b"\x07\xff")), [(7,) * 3, WHITE]),
        (encoded(Image.frombytes("1", (2, 1), b"\x40")), [(0, 0, 0), WHITE]),
        (encoded(_palette()), [RED, BLUE]),
        (encoded(_palette(), transparency=1), [RED, WHITE]),
        (encoded(_palette(), "GIF", transparency=0), [WHITE, BLUE]),
        (encoded(_alpha()), [WHITE, BLUE, (204,) * 3]),
        (encoded(Image.new("LA", (1, 1), (100, 0))), [WHITE]),
        (encoded(Image.new("RGB", (1, 1), RED), transparency=RED), [WHITE]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
        (encoded(Image.new("RGB", (1, 1), RED), exif=b"Exif\0\0MM\0\x2anonsense"), [RED]),
        (encoded(_palette(), "GIF", save_all=True, append_images=[_alpha()]), [RED, BLUE]),
    ],
)  # fmt: skip
def test_modes(content, expected):
    assert first_row(content) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (grey([0, 257, 32768, 65535], "uint16", "PNG"), [0, 1, 128, 255]),
        (b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 25700), [255, 100]),
        (grey([0, 65535], "int32"), [0, 255]),
        (grey([-100, 20, 100], "int32"), [0, 153, 255]),
        (grey([0, 0.2, 1], "float32"), [0, 51, 255]),
        (grey([0, 100, 255], "float32"), [0, 100, 255]),
        (grey([1000, 1500, 2000], "float32"), [0, 128, 255]),
    ],
)
def test_more_than_8_bits_of_greyscale(content, expected):
    assert [pixel[0] for pixel in first_row(content)] == expected


@given(
    arrays(np.uint16, (300, 2)),
    st.sets(st.integers(0, 65535), min_size=2, max_size=2).map(sorted),
)
def test_value_range_scales_and_clips(values, limits):
    low, high = limits
    expected = np.rint((values.clip(low, high).astype(float) - low) * (255 / (high - low)))
    assert np.array_equal(decode.to_uint8(values, limits), expected)


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, None])
@pytest.mark.parametrize("channels", [3, 4])
def test_value_range_of_16_bit_color(options, channels):
    """Pillow keeps the upper 8 bits, which are 4 of a camera's 12."""
    values = np.random.default_rng(0).integers(0, 4096, (5, 6, channels)).astype(np.uint16)
    values[..., 3:] = 65535
    rgb = {"photometric": "rgb", "extrasamples": ["unassalpha"] * (channels - 3)}
    content = png16(values) if options is None else tiff(values, **rgb, **options)
    expected = np.rint(values[..., :3].astype(float) * 255 / 4095)
    assert np.array_equal(np.asarray(Decoder(value_range=(0, 4095))(content)), expected)
    chosen = Decoder(value_range=(0, 4095), bands=(2, 0, 1))(content)
    assert np.array_equal(np.asarray(chosen), expected[..., (2, 0, 1)])
    assert np.asarray(Decoder()(content)).max() < 17


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    """The stored array is what the camera wrote; the tag says where its row 0, column 0 belong."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16], upright[:8, 16:], upright[8:, :16] = 200, 120, 60  # bottom right stays 0
    stored = {  # EXIF 2.3: position of (row 0, column 0)
        **{1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1]},
        **{5: upright.T, 6: np.rot90(upright, 1)},  # 6: shown after a turn clockwise
        **{7: upright[::-1, ::-1].T, 8: np.rot90(upright, -1)},
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(Image.fromarray(np.ascontiguousarray(stored)), kind, exif=exif)
    for raw in (content, Image.open(io.BytesIO(content))):
        got = np.asarray(Decoder()(raw))[..., 0]
        assert got.shape == upright.shape
        np.testing.assert_allclose(got[4::8, 8::16].astype(int), [[200, 120], [60, 0]], atol=8)


def test_pages_are_refused_with_their_number_or_chosen():
    pages = [Image.new("I;16", (2, 1), 257 * level) for level in (10, 20, 30, 40, 50)]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match="5 pages"):
        Decoder()(content)
    assert first_row(content, bands=(4, 0, 2)) == [(50, 10, 30)] * 2
    assert Decoder(2, bands=(1, 3))(content).tolist() == [[[20, 20]], [[40, 40]]]
    with pytest.raises(ImageError, match=r"5 .* 5"):
        Decoder(bands=(0, 1, 5))(content)
    uneven = encoded(pages[0], "TIFF", save_all=True, append_images=[Image.new("I;16", (3, 3))])
    with pytest.raises(ImageError, match="2 pages"):
        Decoder(1, bands=(0,))(uneven)


@pytest.mark.parametrize("bands", [2, 4, 5, 12])
@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"planarconfig": "separate"}])
def test_bands_are_refused_with_their_number_or_chosen(bands, options):
    values = noise(6, 7, bands)
    given = np.moveaxis(values, -1, 0) if "planarconfig" in options else values
    content = tiff(given, **{"planarconfig": "contig", **options})
    with pytest.raises(ImageError, match=f"{bands} bands"):
        Decoder()(content)
    chosen = (bands - 1, 0, 1)
    assert np.array_equal(np.asarray(Decoder(bands=chosen)(content)), values[..., chosen])
    every = Decoder(bands, bands=tuple(range(bands)))(content)
    assert np.array_equal(np.asarray(every), np.moveaxis(values, -1, 0))
    with pytest.raises(ImageError, match="42 pixels"):
        Decoder(bands=chosen, max_pixels=41)(content)


def test_16_bit_color_in_planes_is_not_misread(monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (5, 6, 3)).astype(np.uint16)
    content = tiff(np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="3 bands"):
        Decoder()(content)
    found = np.asarray(Decoder(bands=(0, 1, 2))(content))
    assert np.array_equal(found, np.rint(values / 257))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingPackageError, match="tifffile"):
        Decoder(bands=(0, 1, 2))(content)


@pytest.mark.parametrize(
    ("in_chans", "raw", "named"),
    [
        (3, noise(4, 5, 4), "4 channels"),
        (12, noise(4, 5), "takes 12"),
        (12, encoded(Image.new("L", (2, 2))), "12 channels"),
        (3, np.zeros((2, 4, 5, 3), np.uint8), "2, 4, 5, 3"),
        (3, np.zeros((0, 5, 3), np.uint8), "0, 5, 3"),
        (1, np.array([["a"]]), "<U1"),
        (1, np.array([[np.inf]]), "finite"),
    ],
)
def test_other_channels_and_types_are_refused(in_chans, raw, named):
    with pytest.raises(ImageError, match=named):
        Decoder(in_chans)(raw)


@pytest.mark.parametrize(
    "options",
    [{"value_range": (5, 5)}, {"bands": (0, 1)}, {"bands": (0, 1, -1)}, {"max_pixels": 0}],
)
def test_impossible_settings(options):
    with pytest.raises(SettingsError):
        Decoder(**options)


def reason(content):
    with pytest.raises(ImageError) as caught:
        Decoder(max_pixels=10_000)(content)
    assert "0x" not in str(caught.value)  # no addresses: a reason is the same in every run
    return str(caught.value)


def test_reasons():
    image = Image.fromarray(noise(64, 64))
    assert "empty" in reason(b"")
    assert reason(b"hello, this is text") == reason(b"\0" * 100)
    damaged = bytearray(encoded(image))
    damaged[2000:2100] = bytes(100)
    assert "broken" in reason(bytes(damaged))
    assert "array" in reason(b"\x93NUMPY junk")
    assert "10,000,000,000" in reason(png_bytes(100_000, 100_000, 8, 2, bytes(1_000_000)))
    assert "10,100" in reason(encoded(Image.new("L", (101, 100))))
    assert Decoder(max_pixels=10_000)(encoded(Image.new("L", (100, 100)))).size == (100, 100)


def test_pillow_is_left_as_it_was(monkeypatch):
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "truncated" in reason(encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-100])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # between Pillow's warning and error
        Decoder(max_pixels=10_000)(encoded(Image.new("L", (100, 100))))
    assert limit == Image.MAX_IMAGE_PIXELS


def damage(content, rng):
    """Change, cut out or cut off bytes."""
    content, start = bytearray(content), rng.randrange(20, len(content))
    kind = rng.randrange(3)
    if kind == 0:
        for _ in range(rng.choice([1, 3, 20])):
            content[rng.randrange(2, min(len(content), rng.choice((200, 10_000))))] ^= 85
    elif kind == 1:
        del content[start : start + rng.choice([1, 7, 500])]
        content += b"\xff\xd9"
    else:
        del content[start:]
        content += rng.choice([b"", b"\xff\xd9", bytes(50)])
    return bytes(content)


def test_damaged_files_are_decoded_or_refused():
    """Nothing but an `ImageError` comes out, whatever bytes are changed or missing."""
    rng, image = random.Random(0), Image.fromarray(noise(16, 16))
    names = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000")
    whole = [encoded(image, name) for name in names]
    whole += [encoded(image, "TIFF", compression="tiff_lzw")]
    whole += [tiff(noise(8, 8, 6), planarconfig="contig")]
    whole += [tiff(noise(8, 8).astype(np.uint16), photometric="rgb")]
    whole += [encoded(image.convert("L"), "TIFF", save_all=True, append_images=[image] * 2)]
    whole += [png16(noise(8, 8).astype(np.uint16))]
    with io.BytesIO() as file:
        np.save(file, noise(8, 8))
        whole.append(file.getvalue())
    options = ({}, {"bands": (0, 1, 2)}, {"in_chans": 1, "value_range": (0, 9)}, {"as_tensor": 1})
    for content in whole:
        for number in range(20):
            data = damage(content, rng)
            decode.deep_range(data)
            with contextlib.suppress(ImageError):
                Decoder(max_pixels=100_000, **options[number % 4])(data)


PICTURE = Image.fromarray(noise(40, 50)).resize((96, 72), Image.Resampling.BICUBIC)
EXIF = Image.Exif()
EXIF[0x0112] = 6
JPEG_FILES = {
    "plain": encoded(PICTURE, "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "grey": encoded(PICTURE.convert("L"), "JPEG"),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "rotated": encoded(PICTURE, "JPEG", exif=EXIF),
    "several images": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
    "more behind it": encoded(PICTURE, "JPEG") + b"\n",
    "cut": encoded(PICTURE, "JPEG")[:900],
    "cut in its header": encoded(PICTURE, "JPEG")[:30] + b"\xff\xd9",
    "too large": encoded(Image.new("RGB", (200, 200)), "JPEG"),
}


def result(content, **options):
    """Pixels, or the reason why there are none."""
    try:
        found = Decoder(**options)(content)
    except DataError as error:
        return str(error)
    return found if isinstance(found, torch.Tensor) else pil_to_tensor(found)


@pytest.mark.parametrize("kind", JPEG_FILES)
def test_jpeg_files_become_the_same_pixels_as_tensors(monkeypatch, kind):
    """With torchcodec's interface over Pillow, which reads the unusual ones."""
    given: list[bytes] = []

    def decode_jpeg(content):
        given.append(content)
        return pil_to_tensor(Image.open(io.BytesIO(content)))

    monkeypatch.setattr(decode, "_torchcodec", lambda: decode_jpeg)
    content = JPEG_FILES[kind]
    expected, found = (result(content, max_pixels=39_999, as_tensor=t) for t in (False, True))
    assert torch.equal(expected, found) if torch.is_tensor(expected) else expected == found
    assert bool(given) == (kind in ("plain", "progressive"))
    if given:
        assert isinstance(Decoder(as_tensor=True)(content), torch.Tensor)
        assert isinstance(Decoder(1, as_tensor=True)(content), Image.Image)


def test_torchcodec_gives_pillows_pixels_also_of_damaged_files():
    pytest.importorskip("torchcodec")
    rng = random.Random(0)
    kinds = ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3})
    whole = [encoded(PICTURE, "JPEG", **options) for options in kinds]
    whole += [path.read_bytes() for path in sorted(PHOTOS.glob("*.jpg"))]
    for number in range(400):
        content = whole[number % len(whole)]
        content = damage(content, rng) if number >= len(whole) else content
        expected, found = (result(content, as_tensor=t) for t in (False, True))
        assert torch.equal(expected, found) if torch.is_tensor(expected) else expected == found
