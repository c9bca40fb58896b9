"""Whatever a file's format and mode, the model sees what people see; what is no such image is refused by what it is."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from PIL import Image

import hostile_images as made
from hostile_images import BLUE, GREEN, RED, WHITE, chunk, quarters, saved
from lightllmd.visual.image_file import ImageRefused
from lightllmd.visual.limits import DecodeLimits
from lightllmd.visual.read_image import ReadImage


def read(data: bytes, **limits: Any) -> Image.Image:
    done = ReadImage(data, DecodeLimits(**limits))
    return Image.frombytes("RGB", (done.width, done.height), b"".join(done.rows()))


def refusal(data: bytes, **limits: Any) -> str:
    with pytest.raises(ImageRefused) as refused:
        read(data, **limits)
    assert len(refused.value.message) < 300
    return refused.value.message


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Upper left, upper right, lower left, lower right; near colours count as the same."""
    width, height = image.size
    found = [image.getpixel((x, y)) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [tuple(255 if value > 200 else 0 if value < 55 else value for value in pixel) for pixel in found]


UPRIGHT = [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    "data",
    [
        saved(quarters(), "PNG"),
        saved(quarters(), "PNG") + b"PK\x03\x04 and other garbage" * 100,
        saved(quarters(), "JPEG", quality=95),
        saved(quarters(), "JPEG", quality=95) + b"garbage",
        saved(quarters(), "JPEG", quality=95, progressive=True),
        saved(quarters(), "WEBP", lossless=True),
        saved(quarters(), "WEBP", quality=90),
        saved(quarters(), "GIF"),
        saved(quarters(), "BMP"),
        saved(quarters(), "TIFF"),
        saved(quarters(), "TIFF", compression="tiff_lzw"),
        saved(quarters(), "TIFF", compression="tiff_jpeg"),
        saved(quarters().convert("CMYK"), "JPEG", quality=95),
        saved(quarters().convert("CMYK"), "TIFF"),
        saved(quarters().convert("YCbCr"), "TIFF"),
        saved(quarters().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        saved(quarters().convert("P", palette=Image.Palette.ADAPTIVE, colors=4), "PNG", bits=2),
        saved(quarters().convert("RGBA"), "PNG"),
        saved(quarters().convert("RGBA"), "TIFF"),
        saved(quarters(), "PNG", icc_profile=b"no profile"),
        saved(quarters(), "JPEG", quality=95, icc_profile=b"x" * 200_000),
    ],
)
def test_formats_and_modes_come_out_as_rgb(data: bytes) -> None:
    image = read(data)
    assert image.size == (64, 48)
    assert corners(image) == UPRIGHT


@pytest.mark.parametrize("mode", ["1", "L", "LA"])
def test_grey_stays_grey(mode: str) -> None:
    assert corners(read(saved(Image.new(mode, (9, 9)), "PNG")))[0] == ((255,) * 3 if mode == "LA" else (0, 0, 0))
    full = Image.new(mode, (9, 9), (90, 255) if mode == "LA" else 1 if mode == "1" else 90)
    value = 255 if mode == "1" else 90
    assert read(saved(full, "PNG")).getpixel((4, 4)) == (value,) * 3


@pytest.mark.parametrize(("width", "height"), [(1, 1), (2, 1), (1, 7), (7, 200), (1000, 5)])
def test_small_and_long_ones_are_taken(width: int, height: int) -> None:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"):
        assert read(saved(Image.new("RGB", (width, height), WHITE), kind)).size == (width, height)


def test_one_that_is_read_in_several_strips_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllmd.visual.read_image._STRIP", 64 * 7)
    assert read(saved(quarters(), "PNG")) == quarters()


# --- 16 bits --------------------------------------------------------------------------------------------------------


def test_sixteen_bits_are_cut_to_eight_not_clipped() -> None:
    grey = struct.pack(">4H", 0, 0x40FF, 0x80FF, 0xFFFF)
    image = read(made.png(4, 1, depth=16, colour=0, body=b"\0" + grey))
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 0x40, 0x80, 0xFF]
    for order, mode in (("<", "I;16"), (">", "I;16B")):
        deep = Image.frombytes(mode, (4, 1), struct.pack(f"{order}4H", 0, 0x40FF, 0x80FF, 0xFFFF))
        image = read(saved(deep, "TIFF"))
        assert [image.getpixel((x, 0)) for x in range(4)] == [(0,) * 3, (0x40,) * 3, (0x80,) * 3, (0xFF,) * 3]
    colours = struct.pack(">6H", 0xFFFF, 0x80FF, 0, 0x1234, 0x5678, 0x9ABC)
    image = read(made.png(2, 1, depth=16, colour=2, body=b"\0" + colours))
    assert [image.getpixel((x, 0)) for x in range(2)] == [(0xFF, 0x80, 0), (0x12, 0x56, 0x9A)]


@pytest.mark.parametrize(("mode", "said"), [("F", "floating-point numbers"), ("I", "32-bit integers")])
def test_deeper_ones_are_refused_by_name(mode: str, said: str) -> None:
    assert refusal(saved(Image.new(mode, (4, 4)), "TIFF")) == f"its samples are {said}; 8 and 16 bits are taken"


# --- transparency -----------------------------------------------------------------------------------------------------


def test_what_is_transparent_is_white_whatever_hides_there() -> None:
    alpha = quarters().convert("RGBA")
    alpha.paste((0, 0, 0, 0), (0, 0, 32, 24))
    for kind in ("PNG", "WEBP", "TIFF"):
        options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
        assert corners(read(saved(alpha, kind, **options))) == [WHITE, GREEN, BLUE, WHITE]
    palette = Image.new("P", (64, 48), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 32, 24))
    for kind, transparent in (("PNG", 0), ("PNG", b"\0\xff"), ("GIF", 0)):
        assert corners(read(saved(palette, kind, transparency=transparent))) == [WHITE, RED, RED, RED]
    # PNG's tRNS: one colour of an image without an alpha channel
    assert corners(read(saved(quarters(), "PNG", transparency=RED)))[0] == WHITE
    assert corners(read(saved(Image.new("L", (8, 8)), "PNG", transparency=0)))[0] == WHITE
    half = read(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 128)), "PNG"))
    assert half.getpixel((4, 4)) == (127, 127, 127)


# --- EXIF -------------------------------------------------------------------------------------------------------------

SEEN = {  # of the file, the corners of which are upright, when its camera was held otherwise
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_as_their_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read(saved(quarters(), kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {})))
    assert image.size == ((48, 64) if orientation > 4 else (64, 48))
    assert corners(image) == SEEN[orientation]


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0" + b"garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",  # orientation 99
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x01\0\0\0A\0\0\0\0\0\0\0",  # a text
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\x08\0\0\0\0\0\0\0",
    ],
)
def test_damaged_exif_turns_nothing(exif: bytes) -> None:
    assert corners(read(saved(quarters(), "JPEG", exif=exif, quality=95))) == UPRIGHT
    assert corners(read(saved(quarters(), "PNG", exif=exif))) == UPRIGHT


# --- several frames ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_taken_and_that_is_told(kind: str) -> None:
    first, *others = made.frames()
    options = {"lossless": True} if kind == "WEBP" else {}
    several = saved(first, kind, save_all=True, append_images=others, **options)
    done = ReadImage(several, DecodeLimits())
    assert done.first_of_several
    assert corners(read(several)) == UPRIGHT
    assert not ReadImage(saved(first, "JPEG" if kind == "MPO" else kind), DecodeLimits()).first_of_several


def test_later_frames_are_not_read() -> None:
    first, *others = made.frames(40)
    for kind in ("GIF", "TIFF"):
        several = saved(first, kind, save_all=True, append_images=others)
        cut = several[: len(several) // 2]
        if kind == "GIF":  # a TIFF's folders of tags may be anywhere
            assert corners(read(cut)) == UPRIGHT


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", made.claiming(1, 1))
def test_no_pixel_is_decoded_of_more_than_may_be(kind: str) -> None:
    for width, height in ((8000, 8000), (16000, 15000)):
        said = refusal(made.claiming(width, height)[kind], max_pixels=50_000_000)
        assert said == (
            f"it has {width} x {height} = {width * height} pixels; at most 50000000 may be, [images] max_pixels"
        )


@pytest.mark.parametrize("kind", made.claiming(1, 1))
def test_no_long_strip_is_taken(kind: str) -> None:
    for width, height in ((20_000, 10), (10, 20_000), (201, 1)):
        if (width, height) == (201, 1) and kind == "JPEG":
            continue
        said = refusal(made.claiming(width, height)[kind], max_ratio=200.0)
        assert said == f"it has {width} x {height} pixels; the longer side may be at most 200 times the shorter"
    assert read(saved(Image.new("RGB", (200, 1)), "PNG")).size == (200, 1)


def test_what_its_header_says_has_to_come() -> None:
    claimed = made.claiming(900, 700)
    del claimed["JPEG"]  # whose end is where it says so: libjpeg, as browsers do, fills up
    for kind, data in claimed.items():
        assert any(word in refusal(data) for word in ("cut off", "damaged", "cannot be read")), kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_one_that_is_cut_off_is_refused(kind: str) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    data = saved(noise, kind)
    for size in (len(data) // 2, len(data) // 4, 40, 12):
        said = refusal(data[:size])
        assert any(word in said for word in (f"{kind} file is", f"as {kind} and", "no image")), (size, said)


def test_damaged_pixels_are_refused() -> None:
    whole = saved(quarters(), "PNG")
    at = whole.index(b"IDAT") + 10
    assert "PNG file" in refusal(whole[:at] + b"\xff\xff\xff" + whole[at + 3 :])
    assert "cannot be read" in refusal(made.png(0, 5))
    assert "PNG" in refusal(made.png(5, 5, chunk(b"IHDR", b"x")))


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_bombs_beside_the_pixels_are_not_expanded(kind: bytes) -> None:
    bomb = made.text_bomb(kind, 20 << 20)
    assert len(bomb) < 30_000
    if kind == b"iTXt":  # has another form, in which this is not compressed
        assert read(bomb).size == (1, 1)
    else:
        assert "too large" in refusal(bomb)


# --- what is no such image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (made.SVG, "a drawing (SVG)"),
        (b"\xef\xbb\xbf<svg width='1'/>", "a drawing (SVG)"),
        (b"<!-- x --><!DOCTYPE svg PUBLIC>", "a drawing (SVG)"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript file"),
        (b"\xc5\xd0\xd3\xc6\0\0", "a PostScript file"),
        (b"<!DOCTYPE html><html>", "an HTML page"),
        (b"\n<HTML lang=en>", "an HTML page"),
        (b"<?xml version='1.0'?><a/>", "an XML file"),
        (b'{"error": "not found"}', "text"),
        (b"\0\0\0\x1cftypavif\0\0", "an AVIF image"),
        (b"\0\0\0\x1cftypheic\0\0", "a HEIC image"),
        (b"\0\0\0\x1cftypisom\0\0", "a video (MP4)"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "audio (WAV)"),
        (b"ID3\x04\0", "audio (MP3)"),
        (b"\x1a\x45\xdf\xa3\x01", "a video (Matroska, WebM)"),
        (b"\0\0\1\0\1\0", "an icon (ICO)"),
        (b"8BPS\0\1", "a Photoshop file (PSD)"),
        (b"P6 1 1 255\n\0\0\0", "a portable anymap (PNM)"),
        (b"\0\0\0\x0cjP  \r\n", "a JPEG 2000 image"),
        (b"PK\3\4\0\0", "a ZIP file"),
        (b"\x1f\x8b\x08", "a gzip file"),
        (b"\0" * 50, "no image"),
        (b"\x89PNG", "no image"),
        (b"RIFF\0\0\0\0", "no image"),
        (b"", "no image"),
    ],
)
def test_other_files_are_refused_by_what_they_are(data: bytes, said: str) -> None:
    assert refusal(data) == f"its file is {said}; PNG, JPEG, WEBP, GIF, BMP and TIFF are taken"
