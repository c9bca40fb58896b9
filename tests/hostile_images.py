"""Images that are hard to read, or meant to do harm, made from the formats' specifications; no file is needed."""

from __future__ import annotations

import io
import random
import struct
import zlib
from typing import Any

from PIL import Image

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
SVG = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><image href="http://169.254.169.254/"/></svg>'


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Red, green above blue, white: it shows how an image was turned."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    image.paste(WHITE, (width // 2, height // 2, width, height))
    return image


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2, body: bytes | None = None) -> bytes:
    """Of `chunks` before the pixels; `body`: of all rows, with their filter bytes; None: zeros."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    rows = bytes((1 + (width * samples * depth + 7) // 8) * height) if body is None else body
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", head), *chunks, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def claiming(width: int, height: int) -> dict[str, bytes]:
    """A file of each format whose header says so, with next to nothing behind it."""
    return {
        "PNG": png(width, height, body=b"x"),
        "JPEG": saved(quarters(), "JPEG").replace(struct.pack(">HH", 48, 64), struct.pack(">HH", height, width), 1),
        "GIF": b"GIF89a" + struct.pack("<HH", width, height) + b"\0\0\0,\0\0\0\0" + struct.pack("<HH", width, height)
        + b"\x80\0\0\0\xff\xff\xff\x02\x02\x44\x01\0;",
        "BMP": b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0),
        "TIFF": tiff({256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 1}),
        "WEBP": b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0"
        + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"),
    }  # fmt: skip


def tiff(tags: dict[int, int]) -> bytes:
    """One folder of tags, each one LONG."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)


def text_bomb(kind: bytes = b"zTXt", size: int = 200 << 20) -> bytes:
    """A PNG of 1 x 1 whose text, or colour profile, expands to `size` bytes."""
    squeeze = zlib.compressobj(9)
    packed = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(size >> 20)) + squeeze.flush()
    return png(1, 1, chunk(kind, b"name\0\0" + packed))


def frames(count: int = 3) -> list[Image.Image]:
    return [quarters(), *(Image.new("RGB", (64, 48), (5 * number, 9, 9)) for number in range(1, count))]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """With some bytes changed, cut out or put in, rather in its header."""
    body = bytearray(data)
    for _ in range(draw.choice((1, 2, 5, 20))):
        if len(body) < 50:
            break
        at = draw.randrange(len(body) if draw.random() < 0.5 else min(len(body), 120))
        match draw.randrange(4):
            case 0:
                body[at] = draw.choice((0, 255, 127, 128, draw.randrange(256)))
            case 1:
                body[at : at + 4] = draw.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
            case 2:
                del body[at : at + draw.randrange(1, 30)]
            case 3:
                body[at:at] = body[at : at + draw.randrange(40)]
    return bytes(body)
