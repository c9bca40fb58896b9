"""The contents of messages, texts and images, in the form that a chat template takes.

Most templates of text models take a string. Those of models that see go through a list of parts, and some of them show
nothing of a string.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from lightllmd.errors import InvalidRequest

Message = dict[str, Any]

_IMAGE_PARTS = re.compile(r"[\"']image(_url)?[\"']")
_STRINGS = re.compile(r"\bis\s+(not\s+)?string\b")


def knows_images(source: str) -> bool | None:
    """Whether a template of this source goes through parts of messages, images among them; None: it does, and takes a
    string, too."""
    if not _IMAGE_PARTS.search(source):
        return False
    return None if _STRINGS.search(source) else True


class PartsWriter:
    """Of one conversation. `tag`: of an image; None: it has none. `knows`: as `knows_images`."""

    def __init__(self, tag: str | None, knows: bool | None) -> None:
        self._tag, self._knows = tag, knows

    def content(self, content: object, where: str) -> str | list[dict[str, Any]] | None:
        """A client's, checked: a string, its texts joined by line breaks, but where there are images and the template
        knows them. Raises InvalidRequest."""
        if content is None or isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise InvalidRequest(f"{where}: must be a string or a list of parts")
        parts = [self._part(part, f"{where}[{index}]") for index, part in enumerate(content)]
        images = any(part["type"] == "image" for part in parts)
        return parts if images and self._knows is not False else self._joined(parts)

    def _part(self, part: object, where: str) -> dict[str, Any]:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind == "image" and self._tag is not None:
            return {"type": "image"}
        if kind != "text" or not isinstance(part, dict):
            raise InvalidRequest(f"{where}: parts of type {kind!r} are not supported by this model, text is")
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.text: must be a string")
        return {"type": "text", "text": part["text"]}

    def _joined(self, parts: Sequence[dict[str, Any]]) -> str:
        return "\n".join(self._tag or "" if part["type"] == "image" else part["text"] for part in parts)

    def flat(self, messages: list[Message], tools: bool) -> list[Message]:
        """Strings for contents where some messages are to be told in others' texts: those of tools, or of `tools`."""
        if not tools and all(message["role"] != "tool" and not message.get("tool_calls") for message in messages):
            return messages
        return [
            message | {"content": self._joined(message["content"])}
            if isinstance(message.get("content"), list)
            else message
            for message in messages
        ]

    def suit(self, messages: list[Message]) -> None:
        """Makes parts of strings, where the template knows nothing else."""
        for message in messages if self._knows else ():
            if isinstance(message.get("content"), str):
                message["content"] = [{"type": "text", "text": message["content"]}]
