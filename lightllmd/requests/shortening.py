"""A conversation without its oldest part, where all of it is too long."""

from __future__ import annotations

import math

from lightllmd.requests.asked import Chat, characters
from lightllmd.requests.images import image_parts


def without_oldest(chat: Chat, size: int) -> Chat | None:
    """Without messages of at least `size` characters, or as near to that as can be: of the system's at the beginning
    none is left out, nor the last user's and what follows it, and what stays begins with a user. None: nothing can be
    left out."""
    messages = chat.messages
    head = next((index for index, one in enumerate(messages) if one["role"] not in ("system", "developer")), 0)
    beginnings = [index for index in range(head + 1, len(messages)) if messages[index]["role"] == "user"]
    if not beginnings:
        return None
    dropped, at = 0, head
    for beginning in beginnings:
        dropped += sum(map(characters, messages[at:beginning]))
        at = beginning
        if dropped >= size:
            break
    before, behind = (sum(map(image_parts, messages[:end])) for end in (head, at))
    images = [*chat.images[:before], *chat.images[behind:]]
    return Chat([*messages[:head], *messages[at:]], chat.options, images)


def share(chat: Chat, tokens: int, most: int) -> int:
    """Characters that `chat` has too many, if its prompt has `tokens` and should have at most `most`."""
    return max(1, math.ceil(chat.size * (tokens - most) / tokens))
