"""What sees images without pixels, fetching or a process: of each image the text that a request names it by."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from lightllmd.errors import InvalidRequest, RequestError
from lightllmd.requests.images import AskedImage

TOKENS = 4


@dataclass(frozen=True)
class FakeFacts:
    key: bytes
    tokens: int
    grid: tuple[int, int, int] = (1, 0, 0)


def key_of(content: str) -> bytes:
    return blake2b(content.encode(), digest_size=16).digest()


class FakeSeen:
    def __init__(self, sight: FakeSight, images: Sequence[AskedImage]) -> None:
        self.images = images
        self.facts = [FakeFacts(key_of(one.content), sight.tokens) for one in images]
        self.released = 0
        self._sight = sight

    def release(self) -> None:
        self.released += 1
        self._sight.held.discard(self)

    def when_lost(self, tell: Callable[[RequestError], None]) -> None:
        self.lose = tell


class FakeSight:
    """Refuses what has "broken" in its name."""

    def __init__(self, tokens: int = TOKENS) -> None:
        self.tokens = tokens
        self.shown: list[AskedImage] = []
        self.held: set[FakeSeen] = set()
        self.successor: FakeSight | None = None
        self.closed = False
        self.looked: asyncio.Event | None = None  # what is shown waits for it

    async def show(self, images: Sequence[AskedImage]) -> FakeSeen:
        if self.looked is not None:
            await self.looked.wait()
        for image in images:
            if "broken" in image.content:
                raise InvalidRequest(f"{image.field}: no image", param=image.field)
        self.shown += images
        seen = FakeSeen(self, images)
        self.held.add(seen)
        return seen

    def migrate(self, successor: FakeSight) -> None:
        self.successor = successor

    def close(self) -> None:
        self.closed = True
