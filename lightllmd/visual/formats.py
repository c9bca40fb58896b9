"""What a file is, by its first bytes: the formats that are decoded, and names for what is sent instead of them."""

from __future__ import annotations

import codecs
import re

from lightllmd.visual.image_file import ImageRefused

HEAD = 4096  # bytes that tell
DECODED = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"\0\0\1\0", "an icon (ICO)"),
    (b"\0\0\2\0", "a cursor (CUR)"),
    (b"8BPS", "a Photoshop file (PSD)"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"qoif", "a QOI image"),
    (b"DDS ", "a DDS image"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"#?RADIANCE", "a Radiance HDR image"),
    (b"icns", "an icon (ICNS)"),
    (b"\xd7\xcd\xc6\x9a", "a WMF drawing"),
    (b"\x01\0\0\0", "an EMF drawing"),
    (b"\x1f\x8b", "a gzip file"),
    (b"PK\3\4", "a ZIP file"),
    (b"\x1a\x45\xdf\xa3", "a video (Matroska, WebM)"),
    (b"\0\0\1\xba", "a video (MPEG)"),
    (b"\0\0\1\xb3", "a video (MPEG)"),
    (b"FLV\1", "a video (FLV)"),
    (b"OggS", "an Ogg file, audio or video"),
    (b"fLaC", "audio (FLAC)"),
    (b"ID3", "audio (MP3)"),
    (b"\xff\xfb", "audio (MP3)"),
    (b"\xff\xf1", "audio (AAC)"),
    (b"\x7fELF", "a program"),
    (b"version https://git-lfs", "a pointer of Git LFS"),
)
_RIFF = {b"WEBP": "WEBP", b"WAVE": "audio (WAV)", b"AVI ": "a video (AVI)"}
_BRANDS = {  # of ISO base media files, which are told from each other by these
    b"avif": "an AVIF image",
    b"avis": "an AVIF image",
    b"heic": "a HEIC image",
    b"heix": "a HEIC image",
    b"hevc": "a HEIC image",
    b"mif1": "a HEIF image",
    b"msf1": "a HEIF image",
    b"M4A ": "audio (M4A)",
}
_PORTABLE = re.compile(rb"P[1-7]\s")
_SVG = re.compile(rb"<svg[\s>]|<!DOCTYPE\s+svg", re.IGNORECASE)
_HTML = re.compile(rb"\s*<(!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE)
_CONTROLS = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def format_of(head: bytes) -> str:
    """One of DECODED, of a file that begins so. Raises ImageRefused, which says what it is instead, as far as known."""
    found = _look(head)
    if found in DECODED:
        return found
    taken = f"{', '.join(DECODED[:-1])} and {DECODED[-1]} are taken"
    raise ImageRefused(f"its file is {found}; {taken}" if found else f"its file is no image; {taken}")


def _look(head: bytes) -> str:
    for start, found in _STARTS:
        if head.startswith(start):
            return found
    if head.startswith(b"RIFF") and len(head) >= 12:
        return _RIFF.get(head[8:12], "")
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], "a video (MP4)")
    if _PORTABLE.match(head):
        return "a portable anymap (PNM)"
    text = head.removeprefix(_BYTE_ORDER_MARK)
    if _SVG.search(text):
        return "a drawing (SVG)"
    if _HTML.match(text):
        return "an HTML page"
    if text.lstrip()[:5].lower() == b"<?xml":
        return "an XML file"
    return "text" if text and _is_text(text) else ""


def _is_text(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return _CONTROLS.search(head) is None


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Width and height of a WEBP that begins so (RFC 9649, 2.5 to 2.7); None where it is damaged. Its decoder takes
    memory for all pixels before it tells."""
    kind, body = head[12:16], head[20:]
    if kind == b"VP8X" and len(body) >= 10:
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) >= 10:
        sides = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return sides[0] & 0x3FFF, sides[1] & 0x3FFF
    if kind == b"VP8L" and body[:1] == b"\x2f" and len(body) >= 5:
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
