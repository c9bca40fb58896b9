"""Images that a request holds itself: base64 (RFC 4648, section 4) or a data URI (RFC 2397) of it."""

from __future__ import annotations

import binascii
import mmap
import re

from lightllmd.errors import show
from lightllmd.visual.image_file import HeldBytes, ImageFile, ImageRefused, MemoryWriter

_HEAD = 256  # bytes, of a data URI before its data
_DATA = re.compile(rb"\s*(data:)?([^,;\s]*(?:;[^,;\s]*)*?)(;\s*base64)?,", re.IGNORECASE)
_BREAKS = b"\r\n\t "  # which base64 of mail and of shells has in it
_PART = 64 << 10  # characters that are decoded while the interpreter does nothing else
_FOREIGN = re.compile(rb"[^A-Za-z0-9+/]")


def decode(fd: int, size: int, max_bytes: int, held: HeldBytes | None = None) -> ImageFile:
    """The image of a text of `size` bytes in memfd `fd`. Takes time: for a thread. Raises ImageRefused, OSError, and
    NotReady where too much is held.

    Line breaks may be anywhere, all else has to be as it should.
    """
    if not size:
        raise ImageRefused("its data are empty")
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as text, MemoryWriter(held) as out:
        at = _begin(text)
        rest, ended = b"", False
        while at < size:
            part = rest + text[at : at + _PART].translate(None, _BREAKS)
            at += _PART
            if at < size:
                part, rest = part[: len(part) & ~3], part[len(part) & ~3 :]
            if not part:
                continue
            if ended:
                raise ImageRefused("its base64 goes on behind its padding")
            out.write([_decoded(part)])
            ended = part.endswith(b"=")
            if out.size > max_bytes:
                raise ImageRefused(f"its data are more than {max_bytes} bytes, [images] max_bytes")
        if not out.size:
            raise ImageRefused("its data are empty")
        return out.finish()


def _begin(text: mmap.mmap) -> int:
    """Where the base64 begins. `image/png;base64,…` is taken for a data URI, too: clients of some APIs write that."""
    head = text[:_HEAD]
    if b"," not in head:
        if head.lstrip(_BREAKS)[:5].lower() == b"data:":
            raise ImageRefused(f"its data URI has no comma in its first {_HEAD} characters")
        return 0
    found = _DATA.match(head)
    if found is None or not (found[1] or found[3]):
        raise ImageRefused(f"{_show(head[: head.index(b',')])} is no beginning of a data URI or of base64")
    if not found[3]:
        raise ImageRefused('its data URI is not in base64: ";base64" has to stand before the comma')
    return found.end()


def _decoded(part: bytes) -> bytes:
    try:
        return binascii.a2b_base64(part, strict_mode=True)
    except binascii.Error:
        foreign = _FOREIGN.search(part.rstrip(b"="))
        if foreign is None:
            raise ImageRefused("its base64 is cut off, or wrongly padded") from None
        hint = " (the alphabet for URLs is not taken)" if foreign[0] in b"-_" else ""
        raise ImageRefused(f"its base64 has {_show(foreign[0])} in it{hint}") from None


def _show(text: bytes) -> str:
    return show(text.decode("utf-8", "replace"))
