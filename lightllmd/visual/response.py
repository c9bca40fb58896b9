"""A server's answer, read strictly and within bounds: status, the fields that matter, and the body as it comes."""

from __future__ import annotations

import zlib
from typing import Any

import httptools

from lightllmd.errors import show
from lightllmd.visual.image_file import ImageRefused

MAX_HEAD = 64 << 10  # bytes, of all heads: servers may send provisional answers before the one that counts
_PARTS = 64 << 10  # bytes of chunks' sizes, extensions and trailers, beside a quarter of the body
_PROVISIONAL = range(100, 200)
_REDIRECTS = (301, 302, 303, 307, 308)
_EXPANDED = 256 << 10  # bytes, at a time
_REASONS = {
    401: "wants a password",
    403: "does not give it away",
    404: "has no such file",
    410: "has it no more",
    429: "is asked too often",
}


class Response:
    """Of one request. `feed` what comes, then `end` where the connection ends; both raise ImageRefused.

    `who` begins the sentences, such as 'host "example.org"'.
    """

    def __init__(self, who: str, max_bytes: int) -> None:
        self._who, self._max_bytes = who, max_bytes
        self._parser = httptools.HttpResponseParser(self)
        self._refusal: ImageRefused | None = None  # raised in a callback of the parser
        self._fields: dict[str, str] = {}
        self._fed = 0  # bytes
        self._body_begun = False
        self._parts: list[bytes] = []  # of the body, as sent
        self._expander: Any = None
        self._length = 0  # bytes of the body, as sent
        self._expanded = 0  # bytes of the body, as it is kept
        self.location: str | None = None  # where a redirect leads; known before the body
        self.complete = False

    def feed(self, data: bytes) -> None:
        """Some more bytes."""
        self._fed += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            raise ImageRefused(f"{self._who} wants to speak another protocol") from None
        except httptools.HttpParserError as error:
            if not self.complete:
                cause = self._refusal or ImageRefused(f"{self._who} does not answer in HTTP: {error}")
                raise cause from None
        if not self._body_begun:
            if self._fed > MAX_HEAD:
                raise ImageRefused(f"{self._who} answers with more than {MAX_HEAD} bytes of header")
        elif self._fed > MAX_HEAD + _PARTS + self._length + self._length // 4:
            raise ImageRefused(f"{self._who} sends its answer in parts that are too small")

    def end(self) -> None:
        """The server sends no more."""
        if not self._body_begun or "content-length" in self._fields or "transfer-encoding" in self._fields:
            missing = (
                f"ends the connection after {self._length} bytes of the image"
                if self._body_begun
                else ("ends the connection without an answer")
            )
            raise ImageRefused(f"{self._who} {missing}")
        self.complete = True

    def take(self) -> list[bytes]:
        """The body, as far as it has come, expanded; to be called until it gives nothing. Takes time: of a compressed
        body a thread should do it. Raises ImageRefused."""
        if self._expander is None:
            parts, self._parts = self._parts, []
        else:
            parts = self._expand()
        self._expanded += sum(map(len, parts))
        if self._expanded > self._max_bytes:
            raise self._too_large()
        return parts

    @property
    def compressed(self) -> bool:
        """Whether the body has to be expanded."""
        return self._expander is not None

    def _expand(self) -> list[bytes]:
        waiting, self._parts = b"".join(self._parts), []
        if not waiting:
            return []
        try:
            part = self._expander.decompress(waiting, _EXPANDED)
        except zlib.error:
            raise ImageRefused(f"{self._who} sends a compressed body that is damaged") from None
        if self._expander.unconsumed_tail:
            self._parts = [self._expander.unconsumed_tail]
        return [part] if part else self._expand()

    def _too_large(self) -> ImageRefused:
        return ImageRefused(f"{self._who} sends more than {self._max_bytes} bytes, [images] max_bytes")

    # --- callbacks of the parser --------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """A field; the parser has checked its form."""
        self._fields[name.decode("latin-1").lower()] = value.decode("latin-1").strip()

    def on_headers_complete(self) -> None:
        """What the status says."""
        try:
            self._judge(self._parser.get_status_code())
        except ImageRefused as refusal:
            self._refusal = refusal
            raise

    def _judge(self, status: int) -> None:
        if status in _PROVISIONAL:
            self._fields.clear()
            return
        self._body_begun = True
        if status in _REDIRECTS and "location" in self._fields:
            self.location = _as_text(self._fields["location"])
            return
        if status != 200:
            reason = f" ({_REASONS[status]})" if status in _REASONS else ""
            raise ImageRefused(f"{self._who} answers with status {status}{reason}")
        coding = self._fields.get("content-encoding", "identity").lower()
        if coding in ("gzip", "x-gzip"):
            self._expander = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        elif coding == "deflate":
            self._expander = zlib.decompressobj()
        elif coding != "identity":
            raise ImageRefused(f"{self._who} sends a body in the encoding {show(coding)}, which was not asked for")
        transfer = self._fields.get("transfer-encoding", "chunked").lower()
        if transfer != "chunked":
            raise ImageRefused(f"{self._who} sends a body in the encoding {show(transfer)}, which was not asked for")
        if int(self._fields.get("content-length", 0)) > self._max_bytes:
            raise self._too_large()

    def on_body(self, part: bytes) -> None:
        """Some of the body."""
        self._length += len(part)
        if self._length > self._max_bytes:
            self._refusal = self._too_large()
            raise self._refusal
        if self.location is None:
            self._parts.append(part)

    def on_message_complete(self) -> None:
        """All of the answer is there, or a provisional one."""
        self.complete = self._body_begun


def _as_text(field: str) -> str:
    """UTF-8, where it is: what servers write beside the rules."""
    raw = field.encode("latin-1")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return field
