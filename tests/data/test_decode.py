"""Decoding of every kind of image, against pixels worked out by hand or by plain Pillow."""

import contextlib
import io
import random
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from inputs import encoded, noise
from PIL import Image, ImageFile
from torchvision.transforms.functional import pil_to_tensor

from ijepa_zoo.data import Decoder, decode
from ijepa_zoo.errors import DataError, ImageError, MissingPackageError, SettingsError

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
PHOTOS = Path(__file__).parents[2] / "examples" / "images" / "photos"


def pixels(content: bytes, **options: object) -> list[tuple[int, ...]]:
    """Of the first row."""
    image = Decoder(**options)(content)
    assert image.mode == "RGB"
    return [tuple(map(int, pixel)) for pixel in np.asarray(image)[0]]


def grey(values: list[list[float]], dtype: str, kind: str = "TIFF") -> bytes:
    return encoded(Image.fromarray(np.array(values, dtype)), kind)


def first_row(content: bytes, **options: object) -> list[int]:
    return [pixel[0] for pixel in pixels(content, **options)]


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bytes(width: int, height: int, depth: int, kind: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits, which Pillow cannot write in color."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_bytes(width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], rows)


def tiff(values: np.ndarray, **options: object) -> bytes:
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, values, **{"photometric": "minisblack", **options})
    return file.getvalue()


def test_plain_files_are_pillows() -> None:
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 60}), ("WEBP", {}), ("BMP", {})):
        content = encoded(Image.fromarray(noise(20, 30)), kind, **options)
        assert Decoder()(content).tobytes() == Image.open(io.BytesIO(content)).tobytes()
        luma = Image.open(io.BytesIO(content)).convert("L")
        assert Decoder(in_chans=1)(content).tobytes() == luma.tobytes()


def test_greyscale_one_bit_palette_alpha_and_cmyk() -> None:
    assert pixels(encoded(Image.frombytes("L", (2, 1), b"\x07\xff"))) == [(7,) * 3, WHITE]
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 1)
    assert pixels(encoded(bits)) == [(0, 0, 0), WHITE]
    palette = Image.frombytes("P", (2, 1), b"\x00\x01")
    palette.putpalette([*RED, *BLUE])
    assert pixels(encoded(palette)) == [RED, BLUE]
    assert pixels(encoded(palette, transparency=1)) == [RED, WHITE]
    assert pixels(encoded(palette, "GIF", transparency=0)) == [WHITE, BLUE]
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))  # a fifth black, four fifths white
    assert pixels(encoded(image)) == [WHITE, BLUE, (204,) * 3]
    assert pixels(encoded(Image.new("LA", (1, 1), (100, 0)))) == [WHITE]
    assert pixels(encoded(Image.new("LA", (1, 1), (100, 255)))) == [(100,) * 3]
    assert pixels(encoded(Image.new("RGB", (1, 1), RED), transparency=RED)) == [WHITE]
    assert pixels(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF")) == [RED]
    black = pixels(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "JPEG"))
    assert max(black[0]) < 5  # black ink is black, not its negative


def test_more_than_8_bits_of_greyscale() -> None:
    for kind in ("PNG", "TIFF"):
        values = grey([[0, 257, 32768, 65535]], "uint16", kind)
        assert first_row(values) == [0, 1, 128, 255]
    pgm = b"P5 2 1 65535\n" + struct.pack(">2H", 65535, 25700)
    assert first_row(pgm) == [255, 100]
    assert first_row(grey([[0, 65535]], "int32")) == [0, 255]
    assert first_row(grey([[-100, 20, 100]], "int32")) == [0, 153, 255]
    assert first_row(grey([[0, 0.2, 1]], "float32")) == [0, 51, 255]
    assert first_row(grey([[0, 100, 255]], "float32")) == [0, 100, 255]
    assert first_row(grey([[1000, 1500, 2000]], "float32")) == [0, 128, 255]
    with pytest.raises(ImageError):
        Decoder()(grey([[0, float("nan")]], "float32"))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_value_range_scales_and_clips(kind: str) -> None:
    values = np.array([[0, 100, 2147, 4095, 65535]], np.uint16)
    found = first_row(grey(values.tolist(), "uint16", kind), value_range=(100, 4095))
    assert found == [0, 0, round(2047 * 255 / 3995), 255, 255]
    eight = encoded(Image.fromarray(noise(4, 5)), kind)
    assert Decoder(value_range=(100, 4095))(eight).tobytes() == noise(4, 5).tobytes()


@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"byteorder": ">"}, None])
@pytest.mark.parametrize("channels", [3, 4])
def test_value_range_of_16_bit_color(options: dict[str, str] | None, channels: int) -> None:
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
    if channels == 3:
        found = np.array(decode.deep_range(content))
        assert np.abs(found - (values.min(), values.max())).max() < 256


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
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
    image = Image.fromarray(np.ascontiguousarray(stored))
    options = {"quality": 95} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    content = encoded(image, kind, exif=exif, **options)
    for raw in (content, Image.open(io.BytesIO(content))):
        got = np.asarray(Decoder()(raw))[..., 0]
        assert got.shape == upright.shape
        np.testing.assert_allclose(got[4::8, 8::16].astype(int), [[200, 120], [60, 0]], atol=8)


def test_broken_exif_leaves_the_pixels() -> None:
    content = encoded(Image.new("RGB", (1, 1), RED), exif=b"Exif\0\0MM\0\x2anonsense")
    assert pixels(content) == [RED]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert pixels(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))[
        0
    ] == (RED)


def test_pages_are_refused_with_their_number_or_chosen() -> None:
    pages = [Image.new("I;16", (2, 1), 257 * level) for level in (10, 20, 30, 40, 50)]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(ImageError, match="5 pages"):
        Decoder()(content)
    assert pixels(content, bands=(4, 0, 2)) == [(50, 10, 30)] * 2
    assert Decoder(2, bands=(1, 3))(content).tolist() == [[[20, 20]], [[40, 40]]]
    assert Decoder(1, bands=(1,))(content).tobytes() == bytes([20, 20])
    with pytest.raises(ImageError, match=r"5 .* 7"):
        Decoder(bands=(0, 1, 7))(content)
    uneven = encoded(pages[0], "TIFF", save_all=True, append_images=[Image.new("I;16", (3, 3))])
    with pytest.raises(ImageError, match="2 pages"):
        Decoder(1, bands=(0,))(uneven)


@pytest.mark.parametrize("bands", [2, 3, 4, 5, 12])
@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"planarconfig": "separate"}])
def test_bands_are_refused_with_their_number_or_chosen(
    bands: int, options: dict[str, object]
) -> None:
    values = noise(6, 7, bands)
    separate = options.get("planarconfig") == "separate"
    given = {"planarconfig": "contig", **options}
    content = tiff(np.moveaxis(values, -1, 0) if separate else values, **given)
    with pytest.raises(ImageError, match=f"{bands} bands"):
        Decoder()(content)
    chosen = (bands - 1, 0, 1)
    assert np.array_equal(np.asarray(Decoder(bands=chosen)(content)), values[..., chosen])
    every = tuple(range(bands))
    found = Decoder(bands, bands=every)(content)
    assert np.array_equal(np.asarray(found), np.moveaxis(values, -1, 0) if bands != 3 else values)
    with pytest.raises(ImageError, match="42 pixels"):
        Decoder(bands=chosen, max_pixels=41)(content)


def test_16_bit_color_in_planes_is_not_misread() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 6, 3)).astype(np.uint16)
    content = tiff(np.moveaxis(values, -1, 0), photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="3 bands"):
        Decoder()(content)
    found = np.asarray(Decoder(bands=(0, 1, 2))(content))
    assert np.array_equal(found, np.rint(values / 257))


def test_bands_need_tifffile(monkeypatch: pytest.MonkeyPatch) -> None:
    content = tiff(noise(6, 7, 5), planarconfig="contig")
    monkeypatch.setitem(__import__("sys").modules, "tifffile", None)
    with pytest.raises(MissingPackageError, match="tifffile"):
        Decoder(bands=(0, 1, 2))(content)


def test_arrays_of_other_types() -> None:
    many = noise(6, 7, 12)
    deep = many.astype(np.int32) * 4095 // 255
    found = Decoder(12, (0, 4095))(deep).permute(1, 2, 0)
    assert np.abs(found.int().numpy() - many).max() <= 1
    color = noise(6, 7)
    assert np.array_equal(np.asarray(Decoder()(color / np.float32(255))), color)


@pytest.mark.parametrize(
    ("in_chans", "raw", "named"),
    [
        (3, noise(4, 5, 4), "4 channels"),
        (1, noise(4, 5), "3 channels"),
        (12, noise(4, 5), "takes 12"),
        (12, encoded(Image.new("L", (2, 2))), "12 channels"),
        (3, np.zeros((2, 4, 5, 3), np.uint8), "2, 4, 5, 3"),
        (3, np.zeros((0, 5, 3), np.uint8), "0, 5, 3"),
        (1, np.array([["a"]]), "<U1"),
        (1, np.array([[np.inf]]), "finite"),
    ],
)
def test_other_channels_and_types_are_refused(in_chans: int, raw: object, named: str) -> None:
    with pytest.raises(ImageError, match=named):
        Decoder(in_chans)(raw)


@pytest.mark.parametrize(
    "options",
    [{"value_range": (5, 5)}, {"bands": (0, 1)}, {"bands": (0, 1, -1)}, {"max_pixels": 0}],
)
def test_settings_that_cannot_work(options: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        Decoder(**options)


def reason(content: bytes, max_pixels: int = 10_000) -> str:
    with pytest.raises(ImageError) as caught:
        Decoder(max_pixels=max_pixels)(content)
    assert "0x" not in str(caught.value)  # no addresses: a reason is the same in every run
    return str(caught.value)


def test_reasons() -> None:
    image = Image.fromarray(noise(64, 64))
    assert "empty" in reason(b"")
    assert reason(b"hello, this is text") == reason(b"\0" * 100)
    assert "truncated" in reason(encoded(image, "JPEG")[:-100])
    damaged = bytearray(encoded(image))
    damaged[2000:2100] = bytes(100)
    assert "broken" in reason(bytes(damaged))
    assert "array" in reason(b"\x93NUMPY junk")
    with io.BytesIO() as file:
        np.save(file, np.array([{}], object), allow_pickle=True)
        assert "array" in reason(file.getvalue())


def test_pixel_limit_is_checked_in_the_header() -> None:
    bomb = png_bytes(100_000, 100_000, 8, 2, bytes(1_000_000))
    assert "10,000,000,000" in reason(bomb)
    assert "10,100" in reason(encoded(Image.new("L", (101, 100))))
    assert Decoder(max_pixels=10_000)(encoded(Image.new("L", (100, 100)))).size == (100, 100)


def test_pillow_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert "truncated" in reason(encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-100])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # between Pillow's warning and error
        Decoder(max_pixels=10_000)(encoded(Image.new("L", (100, 100))))
    assert limit == Image.MAX_IMAGE_PIXELS


def change_bytes(content: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 3, 20])):
        content[rng.randrange(2, min(len(content), rng.choice((200, 10_000))))] = rng.randrange(256)


def cut_out(content: bytearray, rng: random.Random) -> None:
    start = rng.randrange(2, len(content) - 2)
    del content[start : start + rng.choice([1, 7, 500])]
    content += b"\xff\xd9"


def cut_off(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(20, len(content)) :]
    content += rng.choice([b"", b"\xff\xd9", bytes(50)])


DAMAGES = [change_bytes, cut_out, cut_off]


def test_damaged_files_are_decoded_or_refused() -> None:
    """Nothing but an `ImageError` comes out, whatever bytes are changed or missing."""
    rng = random.Random(0)
    image = Image.fromarray(noise(16, 16))
    names = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "JPEG2000")
    whole = {name: encoded(image, name) for name in names}
    whole["LZW"] = encoded(image, "TIFF", compression="tiff_lzw")
    whole["bands"] = tiff(noise(8, 8, 6), planarconfig="contig")
    whole["deep TIFF"] = tiff(noise(8, 8).astype(np.uint16), photometric="rgb")
    whole["pages"] = encoded(image.convert("L"), "TIFF", save_all=True, append_images=[image] * 2)
    whole["deep PNG"] = png16(noise(8, 8).astype(np.uint16))
    with io.BytesIO() as file:
        np.save(file, noise(8, 8))
        whole["array"] = file.getvalue()
    decoders = [
        *(Decoder(max_pixels=100_000), Decoder(max_pixels=100_000, bands=(0, 1, 2))),
        *(
            Decoder(1, (0, 4095), max_pixels=100_000),
            Decoder(3, max_pixels=100_000, as_tensor=True),
        ),
    ]
    for name, content in whole.items():
        for number in range(40):
            data = bytearray(content)
            rng.choice(DAMAGES)(data, rng)
            decode.deep_range(bytes(data))
            with contextlib.suppress(ImageError):
                found = decoders[number % 4](bytes(data))
                assert found.mode in ("RGB", "L"), name


PICTURE = Image.fromarray(noise(40, 50)).resize((96, 72), Image.Resampling.BICUBIC)
EXIF = Image.Exif()
EXIF[0x0112] = 6
JPEG_FILES = {
    "plain": encoded(PICTURE, "JPEG"),
    "progressive": encoded(PICTURE, "JPEG", progressive=True),
    "grey": encoded(PICTURE.convert("L"), "JPEG"),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG"),
    "rotated": encoded(PICTURE, "JPEG", exif=EXIF),
    "PNG": encoded(PICTURE),
    "several images": encoded(PICTURE, "MPO", save_all=True, append_images=[PICTURE]),
    "more behind it": encoded(PICTURE, "JPEG") + b"\n",
    "cut": encoded(PICTURE, "JPEG")[:900],
    "cut in its header": encoded(PICTURE, "JPEG")[:30] + b"\xff\xd9",
    "too large": encoded(Image.new("RGB", (200, 200)), "JPEG"),
}


def result(content: bytes, **options: object) -> torch.Tensor | str:
    """Pixels, or the reason why there are none."""
    try:
        found = Decoder(**options)(content)
    except DataError as error:
        return str(error)
    return found if isinstance(found, torch.Tensor) else pil_to_tensor(found)


@pytest.mark.parametrize("kind", JPEG_FILES)
def test_jpeg_files_become_the_same_pixels_as_tensors(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """By a decoder with torchcodec's interface, made of Pillow, which reads the unusual ones."""
    given: list[bytes] = []

    def decode_jpeg(content: bytes) -> torch.Tensor:
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


def test_torchcodec_gives_pillows_pixels_also_of_damaged_files() -> None:
    if decode._torchcodec() is None:
        pytest.skip("torchcodec is not installed")
    rng = random.Random(0)
    kinds = ({}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 3})
    whole = [encoded(PICTURE, "JPEG", **options) for options in kinds]
    whole += [path.read_bytes() for path in sorted(PHOTOS.glob("*.jpg"))]
    assert all(isinstance(Decoder(as_tensor=True)(content), torch.Tensor) for content in whole)
    for number in range(400):
        content = bytearray(whole[number % len(whole)])
        if number >= len(whole):
            rng.choice(DAMAGES)(content, rng)
        expected, found = (result(bytes(content), as_tensor=t) for t in (False, True))
        assert torch.equal(expected, found) if torch.is_tensor(expected) else expected == found
