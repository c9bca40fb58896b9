"""The images of a request: as a client names them, and as parts of messages.

A dialect puts `image_at(url, field)` where its body has an image: beside a prompt that is a text (`Prompt.images`), in
the order of the tags in that text, or as a part of a message, which `Chat.of` takes out again. From there on a part
that is an image says only that: ``{"type": "image"}``, as chat templates know it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import shown

IMAGE = "image"  # the type of a part of a message
MAX_URL = 8192  # characters of one that names a place; of data: [images] max_bytes
UNSEEN = {
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}  # kinds of parts of messages, of any dialect, and what they are
_MARKDOWN = re.compile(r"!\[[^\]]*\]\(([^)]*)\)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True)
class AskedImage:
    """An image as the client names it; nothing of it has been looked at. What it holds is never shown."""

    field: str  # the dialect's name of it
    kind: Literal["url", "data", "file", "own"]
    # A URL; base64, or a data URI; a path; what a caller in this process has.
    content: Any = dataclasses.field(repr=False)


def image_at(url: str, field: str) -> AskedImage:
    """Raises InvalidRequest for a URL of a kind that is not fetched."""
    found = _SCHEME.match(url)
    scheme = "" if found is None else found[1].lower()
    if scheme == "data":
        return AskedImage(field, "data", url)
    if len(url) > MAX_URL:
        raise InvalidRequest(f"{field}: a URL of {len(url)} characters, more than {MAX_URL}", param=field)
    if scheme in ("http", "https"):
        return AskedImage(field, "url", url)
    if scheme == "file":
        place = urlsplit(url)
        if place.netloc in ("", "localhost") and place.path.startswith("/"):
            return AskedImage(field, "file", unquote(place.path))
    raise InvalidRequest(
        f"{field}: should be a URL of an image: http, https, data or file:///; got {shown(url)}", param=field
    )


def image_of_base64(data: str, field: str) -> AskedImage:
    """Of the text that a body has."""
    return AskedImage(field, "data", data)


def images_in_markdown(text: str, tag: str, field: str) -> tuple[str, list[AskedImage]]:
    """``![](URL)`` in a text, each of which becomes `tag`, as TGI reads prompts of models that see. Raises
    InvalidRequest."""
    images = [image_at(found[1], field) for found in _MARKDOWN.finditer(text)]
    return _MARKDOWN.sub(lambda found: tag, text), images


def unseen(kind: Any, field: str) -> None:
    """Raises InvalidRequest for a part of a message that is audio or video."""
    if isinstance(kind, str) and kind in UNSEEN:
        raise InvalidRequest(
            f"{field}: {kind}: this server takes no {UNSEEN[kind]}; text and images are what it takes", param=field
        )


def taken_out(message: dict[str, Any], images: list[AskedImage]) -> dict[str, Any]:
    """`message` with plain parts for the images among its parts, which are appended to `images`."""
    content = message.get("content")
    if not isinstance(content, list) or not any(isinstance(part, AskedImage) for part in content):
        return message
    parts = []
    for part in content:
        if isinstance(part, AskedImage):
            images.append(part)
            part = {"type": IMAGE}
        parts.append(part)
    return message | {"content": parts}


def image_parts(message: dict[str, Any]) -> int:
    """How many of its parts are images."""
    content = message.get("content")
    return sum(part.get("type") == IMAGE for part in content) if isinstance(content, list) else 0


def content_of(parts: Iterable[str | AskedImage]) -> str | list[Any]:
    """The content of a message: a text, its parts joined by line breaks, where there is no image."""
    given = list(parts)
    if any(isinstance(part, AskedImage) for part in given):
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in given]
    return "\n".join(part for part in given if isinstance(part, str))
