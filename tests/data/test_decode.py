"""Decoding of every kind of image, against pixels worked out by hand or by plain Pillow."""

import io
import struct
import sys
import zlib

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inputs import encoded, noise
from PIL import Image, ImageFile
from torchvision.transforms.functional import pil_to_tensor

from ijepa_zoo.data import Decoder, decode
from ijepa_zoo.errors import DataError, ImageError, MissingPackageError, SettingsError

RED, BLUE, WHITE, BLACK = (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def first_row(content, **options):
    image = Decoder(**options)(content)
    assert image.mode == "RGB"
    return [tuple(map(int, pixel)) for pixel in np.asarray(image)[0]]


def grey(values, dtype, kind="TIFF"):
    return encoded(Image.fromarray(np.array([values], dtype)), kind)


def png_bytes(width, height, depth, kind, rows):
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    for name, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        check = zlib.crc32(name + data)
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)
    return content


def png16(values):
    """A PNG of 16 bits, which Pillow cannot write in color."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_bytes(width, height, 16, {3: 2, 4: 6}[channels], rows)


def tiff(values, **options):
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


PALETTE = Image.frombytes("P", (2, 1), b"\x00\x01")
PALETTE.putpalette([*RED, *BLUE])
ALPHA = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
ALPHA.putpixel((1, 0), (0, 0, 255, 255))
ALPHA.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black, four fifths white


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.frombytes("L", (2, 1), b"\x07\xff")), [7, 255]),
        (encoded(Image.frombytes("1", (2, 1), b"\x40")), [BLACK, WHITE]),
        (encoded(PALETTE), [RED, BLUE]),
        (encoded(PALETTE, transparency=1), [RED, WHITE]),
        (encoded(PALETTE, "GIF", transparency=0), [WHITE, BLUE]),
        (encoded(ALPHA), [WHITE, BLUE, (204,) * 3]),
        (encoded(Image.new("LA", (1, 1), (100, 0))), [WHITE]),
        (encoded(Image.new("RGB", (1, 1), RED), transparency=RED), [WHITE]),
        (encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), [RED]),
        (encoded(Image.new("RGB", (1, 1), RED), exif=b"Exif\0\0MM\0\x2anonsense"), [RED]),
        (encoded(PALETTE, "GIF", save_all=True, append_images=[ALPHA]), [RED, BLUE]),
        # more than 8 bits
        (grey([0, 257, 32768, 65535], "uint16", "PNG"), [0, 1, 128, 255]),
        (b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 25700), [255, 100]),
        (grey([0, 65535], "int32"), [0, 255]),
        (grey([-100, 20, 100], "int32"), [0, 153, 255]),
        (grey([0, 0.2, 1], "float32"), [0, 51, 255]),
        (grey([0, 100, 255], "float32"), [0, 100, 255]),
        (grey([1000, 1500, 2000], "float32"), [0, 128, 255]),
    ],
)  # fmt: skip
def test_modes(content, expected):
    assert first_row(content) == [(v,) * 3 if isinstance(v, int) else v for v in expected]


LIMITS = st.sets(st.integers(0, 65535), min_size=2, max_size=2).map(sorted)


@given(arrays(np.uint16, (300, 2)), LIMITS)
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
    values[0, 0, 3:] = 0  # transparent: white
    rgb = {"photometric": "rgb", "extrasamples": ["unassalpha"] * (channels - 3)}
    content = png16(values) if options is None else tiff(values, **rgb, **options)
    expected = np.rint(values[..., :3].astype(float) * 255 / 4095)
    on_white = expected.copy()
    on_white[0, 0] = 255 if channels == 4 else expected[0, 0]
    assert np.array_equal(np.asarray(Decoder(value_range=(0, 4095))(content)), on_white)
    chosen = Decoder(value_range=(0, 4095), bands=(2, 0, 1))(content)
    assert np.array_equal(np.asarray(chosen), expected[..., (2, 0, 1)])
    assert np.asarray(Decoder()(content))[1:].max() < 17


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 1), (8, 3)])
def test_exif_orientation(kind, orientation, turns):
    """The stored array is what the camera wrote; the tag says where its row 0, column 0 belong."""
    upright = np.kron(np.array([[200, 120], [60, 0]], np.uint8), np.ones((8, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation  # 6 is shown after a turn clockwise
    stored = Image.fromarray(np.ascontiguousarray(np.rot90(upright, turns)))
    content = encoded(stored, kind, exif=exif)
    for raw in (content, Image.open(io.BytesIO(content))):
        got = np.asarray(Decoder()(raw))[4::8, 8::16, 0].astype(int)
        np.testing.assert_allclose(got, [[200, 120], [60, 0]], atol=8)


def test_pages_are_refused_with_their_number_or_chosen():
    pages = [Image.new("I;16", (2, 1), 257 * level) for level in (10, 20, 30, 40, 50)]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    uneven = encoded(pages[0], "TIFF", save_all=True, append_images=[Image.new("I;16", (3, 3))])
    assert first_row(content, bands=(4, 0, 2)) == [(50, 10, 30)] * 2
    assert Decoder(2, bands=(1, 3))(content).tolist() == [[[20, 20]], [[40, 40]]]
    for raw, bands, named in (
        (content, None, "5 pages"),
        (content, (0, 1, 5), "5 .* 5"),
        (uneven, (0, 0, 0), "2 pages"),
    ):
        with pytest.raises(ImageError, match=named):
            Decoder(bands=bands)(raw)


@pytest.mark.parametrize("bands", [2, 4, 5, 12])
@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"planarconfig": "separate"}])
def test_bands_are_refused_with_their_number_or_chosen(bands, options):
    values = noise(6, 7, bands)
    given = np.moveaxis(values, -1, 0) if "planarconfig" in options else values
    content = tiff(given, **{"planarconfig": "contig", **options})
    chosen = (bands - 1, 0, 1)
    assert np.array_equal(np.asarray(Decoder(bands=chosen)(content)), values[..., chosen])
    every = Decoder(bands, bands=tuple(range(bands)))(content)
    assert np.array_equal(np.asarray(every), np.moveaxis(values, -1, 0))
    for decoder, named in ((Decoder(), f"{bands} bands"), (Decoder(3, None, chosen, 41), "42 pix")):
        with pytest.raises(ImageError, match=named):
            decoder(content)


def test_16_bit_color_in_planes_is_not_misread(monkeypatch):
    values = np.random.default_rng(0).integers(0, 65536, (5, 6, 3)).astype(np.uint16)
    content = tiff(np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="bands"):
        Decoder()(content)
    found = np.asarray(Decoder(bands=(0, 1, 2))(content))
    assert np.array_equal(found, np.rint(values / 257))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(MissingPackageError, match="tifffile"):
        Decoder(bands=(0, 1, 2))(content)


JPEG = encoded(Image.fromarray(noise(64, 64)), "JPEG")
GOOD = encoded(Image.fromarray(noise(64, 64)))


@pytest.mark.parametrize(
    ("in_chans", "raw", "named"),
    [
        (3, noise(4, 5, 4), "4 channels"),
        (12, noise(4, 5), "takes 12"),
        (12, GOOD, "12 channels"),
        (3, np.zeros((2, 4, 5, 3), np.uint8), "2, 4, 5, 3"),
        (3, np.zeros((0, 5, 3), np.uint8), "0, 5, 3"),
        (1, np.array([["a"]]), "<U1"),
        (1, np.array([[np.inf]]), "finite"),
        (3, b"", "empty"),
        (3, JPEG[:-100], "truncated"),
        (3, b"this is text", "^not an image"),
        (3, bytes(100), "^not an image"),
        (3, GOOD[:2000] + bytes(100) + GOOD[2100:], "broken"),
        (3, b"\x93NUMPY junk", "array"),
        (3, png_bytes(100_000, 100_000, 8, 2, bytes(1_000_000)), "10,000,000,000"),
        (3, encoded(Image.new("L", (101, 100))), "10,100"),
    ],
)
def test_what_cannot_be_used_has_a_reason(monkeypatch, in_chans, raw, named):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    limit = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ImageError, match=named) as caught:
        Decoder(in_chans, max_pixels=10_000)(raw)
    assert "0x" not in str(caught.value)  # no addresses: a reason is the same in every run
    assert Decoder(max_pixels=10_000)(encoded(Image.new("L", (100, 100)))).size == (100, 100)
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    assert limit == Image.MAX_IMAGE_PIXELS
    for wrong in ({"value_range": (5, 5)}, {"bands": (0, 1)}, {"bands": (0, 1, -1)}):
        with pytest.raises(SettingsError):
            Decoder(**wrong)
    with pytest.raises(SettingsError):
        Decoder(max_pixels=0)


def result(content, **options):
    """Pixels, or the reason why there are none."""
    try:
        found = Decoder(max_pixels=39_999, **options)(content)
    except DataError as error:
        return str(error)
    return found.tolist() if isinstance(found, torch.Tensor) else pil_to_tensor(found).tolist()


PICTURE = Image.fromarray(noise(40, 50)).resize((96, 72))
TURNED = Image.Exif()
TURNED[0x0112] = 6
KINDS = ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3})
PLAIN = [encoded(PICTURE, "JPEG", **options) for options in KINDS]
UNUSUAL = [encoded(PICTURE.convert(mode), "JPEG") for mode in ("L", "CMYK")]
UNUSUAL += [encoded(PICTURE, "JPEG", exif=TURNED), PLAIN[0] + b"\n", PLAIN[0][:900]]
UNUSUAL += [encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE])]
UNUSUAL += [PLAIN[0][:n] + b"\xff\xd9" for n in (30, 900, 1500)]
UNUSUAL += [encoded(Image.new("RGB", (200, 200)), "JPEG")]


@pytest.mark.parametrize("installed", [False, True])
def test_jpeg_files_become_the_same_pixels_as_tensors(monkeypatch, installed):
    """With torchcodec, or with its interface over Pillow, which reads the unusual ones."""
    given = []

    def decode_jpeg(content):
        given.append(content)
        return pil_to_tensor(Image.open(io.BytesIO(content)))

    if installed:
        pytest.importorskip("torchcodec")
    else:
        monkeypatch.setattr(decode, "_torchcodec", lambda: decode_jpeg)
    for content in (*PLAIN, *UNUSUAL):
        assert result(content, as_tensor=True) == result(content)
    assert given[:4] == ([] if installed else PLAIN)
    assert isinstance(Decoder(as_tensor=True)(PLAIN[0]), torch.Tensor)
    assert isinstance(Decoder(1, as_tensor=True)(PLAIN[0]), Image.Image)
