"""From what a request names to what the encoder takes: images fetched, decoded, told apart by content, and prepared."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.errors import InvalidRequest, NotReady
from lightllmd.visual.decode import ImageDecoder
from lightllmd.visual.fetch import Fetcher, Source
from lightllmd.visual.image_file import ImageFile
from lightllmd.visual.picture import Picture

KEY_BYTES = 16
Prepare = Callable[[Picture], Any]
"""What the model's preprocessing makes of a picture, of which nothing is kept. Called in a thread."""


@dataclass
class Viewed:
    """One image. `file` is the caller's to close: until then it counts among the bytes that are held."""

    file: ImageFile
    key: bytes  # see `content_key`
    width: int  # pixels, as EXIF turns it
    height: int
    first_of_several: bool  # frames
    prepared: Any


class Viewer:
    """`secret`: random bytes of the daemon, at most 64, without which no two pictures can be made to have one key.
    `known(key)`: an image of this content is encoded, or will be: nothing is prepared of it."""

    def __init__(
        self,
        fetcher: Fetcher,
        decoder: ImageDecoder,
        prepare: Prepare,
        secret: bytes,
        known: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self._fetcher, self._decoder = fetcher, decoder
        self._prepare, self._secret, self._known = prepare, secret, known

    async def view(self, sources: Sequence[tuple[Source, int]]) -> list[Viewed]:
        """The images of one request, each with its memfd (or -1), in their order.

        Raises InvalidRequest and NotReady, with `index` among their parameters where one image is to blame; nothing is
        left open then.
        """
        files = await self._fetcher.fetch_all(sources)
        tasks = [asyncio.ensure_future(self._view(index, file)) for index, file in enumerate(files)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for file in files:
                file.close()
            raise

    async def _view(self, index: int, file: ImageFile) -> Viewed:
        try:
            async with self._decoder.decoded(file) as picture:
                key = await asyncio.to_thread(content_key, picture, self._secret)
                prepared = None if self._known(key) else await asyncio.to_thread(self._prepare, picture)
                return Viewed(file, key, picture.width, picture.height, picture.first_of_several, prepared)
        except (InvalidRequest, NotReady) as refusal:
            refusal.parameters.setdefault("index", index)
            raise


def content_key(picture: Picture, secret: bytes) -> bytes:
    """Of its pixels and its sides: the same picture has it from any file format, address or request. BLAKE2b (RFC
    7693), keyed. Takes time: for a thread."""
    digest = hashlib.blake2b(key=secret, digest_size=KEY_BYTES)
    digest.update(picture.width.to_bytes(4, "big") + picture.height.to_bytes(4, "big"))
    digest.update(picture.pixels())
    return digest.digest()
