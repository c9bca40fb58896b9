"""Where the bytes of a request's images come from: the web, the request itself, files of this host."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Sequence
from typing import Protocol

from lightllmd.errors import NotReady, show
from lightllmd.visual import encoded, local_file
from lightllmd.visual.image_file import HeldBytes, ImageFile, ImageRefused
from lightllmd.visual.limits import FetchLimits
from lightllmd.visual.resolver import Resolve, SystemResolver
from lightllmd.visual.web import Web
from lightllmd.visual.web_address import scheme_of


class Source(Protocol):
    """One image, as a request names it. `kind`:

    "url": `url` is one of http or https (of file, too, as "file" has it)
    "data": a memfd holds the text as the client wrote it, base64 or a data URI
    "bytes": a memfd holds the image's file
    "file": `path` is a path or a file URL
    """

    @property
    def kind(self) -> str:
        """One of these four."""

    @property
    def url(self) -> str:
        """Of "url"."""

    @property
    def path(self) -> str:
        """Of "file"."""


class Fetcher:
    """Gets images within `limits`: so many at a time for one request, and for all together."""

    def __init__(
        self, limits: FetchLimits, resolve: Resolve | None = None, trust: ssl.SSLContext | None = None
    ) -> None:
        """`resolve`, `trust`: see `Web`. Raises ValueError when a network of `limits` is none."""
        self._limits = limits
        self._web = Web(limits, resolve or SystemResolver(), trust)
        self._fetches = asyncio.Semaphore(limits.fetches)
        self.held = HeldBytes(limits.held_bytes)  # what it has fetched and its callers have not closed

    async def fetch(self, source: Source, memory: int = -1) -> ImageFile:
        """The image's file. `memory`: the memfd of "data" or "bytes", which stays the caller's.

        Raises ImageRefused; NotReady when this process has no descriptor left, or holds as much as it may.
        """
        limits = self._limits
        try:
            if source.kind == "bytes":
                return _own(memory, limits.max_bytes)
            if source.kind == "data":
                size = os.fstat(memory).st_size
                return await asyncio.to_thread(encoded.decode, memory, size, limits.max_bytes, self.held)
            name = source.path if source.kind == "file" else source.url
            if source.kind == "file" or scheme_of(name) == "file":
                return await asyncio.to_thread(local_file.read, name, limits.file_root, limits.max_bytes, self.held)
            if not limits.urls:
                raise ImageRefused(f"its URL {show(name)} is not fetched: [images] urls is false")
            async with self._fetches:
                return await self._web.get(name, self.held)
        except OSError as failure:
            raise NotReady(f"an image cannot be held: {failure.strerror}") from None

    async def fetch_all(self, sources: Sequence[tuple[Source, int]]) -> list[ImageFile]:
        """Of one request, each with its memfd (or -1). The first refusal, with its index as `index`, ends all."""
        mine, most, total = asyncio.Semaphore(self._limits.request_fetches), self._limits.request_bytes, 0

        async def one(index: int, source: Source, memory: int) -> ImageFile:
            async with mine:
                nonlocal total
                try:
                    file = await self.fetch(source, memory)
                    total += file.size
                    if total > most:
                        file.close()
                        raise ImageRefused(f"the images of the request have more than {most} bytes together")
                    return file
                except (ImageRefused, NotReady) as refusal:
                    refusal.parameters["index"] = index
                    raise

        tasks = [asyncio.ensure_future(one(index, *source)) for index, source in enumerate(sources)]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:
                task.cancel()
            for done in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(done, ImageFile):
                    done.close()
            raise


def _own(memory: int, max_bytes: int) -> ImageFile:
    size = os.fstat(memory).st_size
    if not 0 < size <= max_bytes:
        raise ImageRefused(f"its file has {size} bytes; 1 … {max_bytes} are possible, [images] max_bytes")
    return ImageFile(os.dup(memory), size)
