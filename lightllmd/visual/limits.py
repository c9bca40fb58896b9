"""What an image may be and where it may come from: the part of [images] that fetching and decoding read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightllmd.config.images import ImagesSettings


@dataclass(frozen=True, kw_only=True)
class FetchLimits:
    """Of one image, where nothing else is said. Times in seconds, sizes in bytes."""

    urls: bool = True  # http and https URLs are fetched
    timeout: float = 10.0  # from the look-up of the host to the last byte, redirects included
    idle_timeout: float = 5.0  # between two pieces of what a server sends, and for a connection
    max_redirects: int = 3
    allowed_hosts: tuple[str, ...] = ()  # names, "*.example.org", addresses; empty: all
    allowed_networks: tuple[str, ...] = ()  # that are fetched from although they are not public
    file_root: str = ""  # files below this folder may be named; empty: none
    max_bytes: int = 20 << 20
    fetches: int = 32  # at a time, of all requests
    request_fetches: int = 8  # at a time, of one request
    request_bytes: int = 256 << 20  # of all images of a request
    held_bytes: int = 2 << 30  # of all images that are fetched and not let go

    @classmethod
    def of(cls, settings: ImagesSettings) -> FetchLimits:
        """What the operator has set, the rest as it is here."""
        return cls(
            urls=settings.urls,
            timeout=settings.timeout,
            max_redirects=settings.max_redirects,
            allowed_hosts=tuple(settings.allowed_hosts),
            allowed_networks=tuple(settings.allowed_networks),
            file_root=settings.file_root,
            max_bytes=settings.max_bytes,
            request_bytes=max(cls.request_bytes, settings.max_bytes),
            held_bytes=max(cls.held_bytes, 8 * settings.max_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class DecodeLimits:
    """Of one image."""

    max_bytes: int = 20 << 20
    max_pixels: int = 50_000_000  # width times height, as the header says it
    max_ratio: float = 200.0  # of the longer side to the shorter one
    timeout: float = 20.0  # seconds by the clock, once its turn has come
    cpu_seconds: int = 10
    processes: int = 2  # images that are decoded at a time

    @classmethod
    def of(cls, settings: ImagesSettings) -> DecodeLimits:
        """What the operator has set, the rest as it is here."""
        return cls(max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
