"""Looking up the addresses of a host, as the system does, without holding up the event loop or the process's end."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address

from lightllmd.visual.policy import Address

Resolve = Callable[[str], Awaitable[list[Address]]]
"""Of a name, in the order of preference; none: it has no address, or cannot be looked up."""

_THREADS = 128  # look-ups at a time; one that nothing waits for any more goes on until the system gives it up


class SystemResolver:
    """getaddrinfo, each call in a thread that does not outlive the process."""

    def __init__(self, threads: int = _THREADS, look_up: Callable[..., list[tuple]] = socket.getaddrinfo) -> None:
        self._look_up = look_up
        self._free = asyncio.Semaphore(threads)

    async def __call__(self, host: str) -> list[Address]:
        """As `Resolve`."""
        loop = asyncio.get_running_loop()
        await self._free.acquire()
        found: asyncio.Future[list[Address]] = loop.create_future()
        thread = threading.Thread(target=self._run, args=(host, loop, found), name="look-up", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no thread is to be had
            self._free.release()
            return []
        return await found

    def _run(self, host: str, loop: asyncio.AbstractEventLoop, found: asyncio.Future[list[Address]]) -> None:
        addresses: list[Address] = []
        with suppress(OSError, UnicodeError, ValueError):
            for *_, place in self._look_up(host, None, type=socket.SOCK_STREAM):
                address = ip_address(place[0])
                if address not in addresses:
                    addresses.append(address)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._finish, found, addresses)

    def _finish(self, found: asyncio.Future[list[Address]], addresses: list[Address]) -> None:
        self._free.release()
        if not found.done():
            found.set_result(addresses)
