"""What users have reported of other servers' image inputs does not happen here. Each test names the report."""

from __future__ import annotations

import base64
import struct
import zlib

import pytest
from PIL import Image

from hostile_images import GREEN, RED, WHITE, chunk, png, quarters, saved
from lightllmd.visual import encoded
from lightllmd.visual.image_file import ImageFile, ImageRefused
from lightllmd.visual.limits import DecodeLimits
from lightllmd.visual.read_image import ReadImage


def read(data: bytes) -> Image.Image:
    done = ReadImage(data, DecodeLimits())
    return Image.frombytes("RGB", (done.width, done.height), b"".join(done.rows()))


def test_a_height_of_one_is_no_channel() -> None:
    """vllm-project/vllm #9141"""
    for size in ((150, 1), (1, 150), (3, 1), (3, 3)):
        assert read(saved(Image.new("L", size, 77), "PNG")).size == size


def test_what_a_trns_chunk_hides_stays_hidden() -> None:
    """vllm-project/vllm #44974: of palette, grey and RGB images without an alpha channel"""
    palette = chunk(b"PLTE", bytes([*RED, *GREEN])), chunk(b"tRNS", b"\x00\xff")
    image = read(png(2, 1, *palette, colour=3, body=b"\0\0\1"))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]
    image = read(png(2, 1, chunk(b"tRNS", struct.pack(">H", 9)), colour=0, body=b"\0\x09\x0a"))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, (10, 10, 10)]
    image = read(png(2, 1, chunk(b"tRNS", struct.pack(">3H", *RED)), body=b"\0" + bytes([*RED, *GREEN])))
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [WHITE, GREEN]


def test_an_honest_image_that_is_too_large_is_not_decoded() -> None:
    """sgl-project/sglang #28587: 12000 x 12000 pixels of one colour are a small file, and 432 MB of pixels"""
    squeeze = zlib.compressobj(9)
    rows = squeeze.compress(bytes(12_000 * (1 + 12_000 // 8))) + squeeze.flush()
    head = struct.pack(">IIBBBBB", 12_000, 12_000, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    assert len(data) < 1 << 20
    told: list[int] = []
    with pytest.raises(ImageRefused, match=r"12000 x 12000 = 144000000 pixels; at most 50000000 may be"):
        ReadImage(data, DecodeLimits(), told.append)
    assert told == []


def test_what_cannot_be_decoded_is_told_at_once() -> None:
    """ollama/ollama #2367: the request hung"""
    for data in (b"not an image", b"\x89PNG\r\n\x1a\n" + bytes(50), saved(quarters(), "JPEG")[:100]):
        with pytest.raises(ImageRefused):
            read(data)


def test_base64_is_taken_with_and_without_its_media_type() -> None:
    """BerriAI/litellm #1427: "illegal base64 data at input byte 10" for image/jpeg;base64,… to one server, and for
    what has no such beginning to another"""
    data = saved(quarters(), "PNG")
    text = base64.b64encode(data)
    for beginning in (b"", b"data:image/png;base64,", b"image/png;base64,"):
        with ImageFile.of(beginning + text) as given, encoded.decode(given.fd, given.size, 1 << 20) as file:
            assert file.read() == data


def test_a_photo_with_a_smaller_one_in_it_is_one_image() -> None:
    """Comfy-Org/ComfyUI #14127: MPO, as phones make it, with frames of two sizes"""
    data = saved(Image.new("RGB", (136, 76), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (51, 28))])
    assert read(data).size == (136, 76)
