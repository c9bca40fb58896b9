"""Getting an image over HTTP: each host checked, connected to at the address that was checked, redirects included.

No proxy is used, whatever the environment says (it would look up the host, out of reach of the policy), no cookie or
password is sent, and no connection is used twice.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from importlib.metadata import PackageNotFoundError, version

from lightllmd.errors import show
from lightllmd.visual.image_file import HeldBytes, ImageFile, ImageRefused, MemoryWriter
from lightllmd.visual.limits import FetchLimits
from lightllmd.visual.policy import Address, AddressPolicy
from lightllmd.visual.resolver import Resolve
from lightllmd.visual.response import Response
from lightllmd.visual.web_address import WebAddress

_READ = 64 << 10  # bytes
_ADDRESSES = 4  # of a host, that are tried one after the other


class Web:
    """Gets images, within `limits`. `trust`: which certificates are; None: those that the system trusts."""

    def __init__(self, limits: FetchLimits, resolve: Resolve, trust: ssl.SSLContext | None = None) -> None:
        """Raises ValueError when a network of `limits` is none."""
        self._limits = limits
        self._policy = AddressPolicy(limits)
        self._resolve = resolve
        self._trust = trust
        self._agent = _agent()

    async def get(self, url: str, held: HeldBytes | None = None) -> ImageFile:
        """The body that `url` leads to. Raises ImageRefused, which names what the client has named alone: of a redirect
        neither host nor address."""
        place = WebAddress.of(url)
        asked = who = f"host {show(place.host)}"
        seconds = self._limits.timeout
        with MemoryWriter(held) as out:
            try:
                async with asyncio.timeout(seconds):
                    for hop in range(self._limits.max_redirects + 1):
                        location = await self._ask(place, who, out, redirected=hop > 0)
                        if location is None:
                            return out.finish()
                        place, who = _follow(place, location, asked), f"a server that {asked} redirects to"
            except TimeoutError:
                raise ImageRefused(f"{who} takes more than {seconds:g} s, [images] timeout") from None
        raise ImageRefused(f"{asked} redirects more than {self._limits.max_redirects} times, [images] max_redirects")

    async def _ask(self, place: WebAddress, who: str, out: MemoryWriter, *, redirected: bool) -> str | None:
        """One request and its answer; the redirect's location, if it is one."""
        try:
            addresses = await self._addresses(place)
        except ImageRefused:
            if redirected:
                raise ImageRefused(f"{who} may not be fetched from, or has no address") from None
            raise
        reader, writer = await self._connect(place, addresses, who)
        try:
            writer.write(self._request(place))
            return await self._receive(reader, who, out)
        except (OSError, ssl.SSLError):
            raise ImageRefused(f"{who} breaks the connection off") from None
        finally:
            writer.transport.abort()

    async def _addresses(self, place: WebAddress) -> list[Address]:
        """Those that may be connected to. What may not, and what is not there, is refused in the same words: which
        names an inner network has is nothing that a client learns."""
        self._policy.check_host(place.host)
        if place.address is not None:
            if not self._policy.allows(place.address):
                raise ImageRefused(f"address {place.host} is not public, and not in [images] allowed_networks")
            return [place.address]
        found = [address for address in await self._resolve(place.host) if self._policy.allows(address)]
        if not found:
            raise ImageRefused(f"host {show(place.host)} has no address that is public or in [images] allowed_networks")
        return found[:_ADDRESSES]

    async def _connect(
        self, place: WebAddress, addresses: list[Address], who: str
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        for address in addresses:
            sock = socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
            try:
                sock.setblocking(False)
                async with asyncio.timeout(self._limits.idle_timeout):
                    await asyncio.get_running_loop().sock_connect(sock, (str(address), place.port))
                    if place.scheme == "http":
                        return await asyncio.open_connection(sock=sock, limit=_READ)
                    return await asyncio.open_connection(
                        sock=sock, limit=_READ, ssl=await self._tls(), server_hostname=place.server_name
                    )
            except ssl.SSLCertVerificationError as error:
                sock.close()
                raise ImageRefused(f"{who} has a certificate that does not do: {error.verify_message}") from None
            except ssl.SSLError:
                sock.close()
                raise ImageRefused(f"{who} does not speak TLS as it should") from None
            except (OSError, TimeoutError):
                sock.close()
            except BaseException:
                sock.close()
                raise
        raise ImageRefused(f"{who} cannot be connected to")

    async def _tls(self) -> ssl.SSLContext:
        if self._trust is None:  # reads some hundred certificates
            self._trust = await asyncio.to_thread(ssl.create_default_context)
        return self._trust

    def _request(self, place: WebAddress) -> bytes:
        lines = (
            f"GET {place.target} HTTP/1.1",
            f"Host: {place.host_field}",
            f"User-Agent: {self._agent}",
            "Accept: image/*, */*;q=0.1",
            "Accept-Encoding: identity",
            "Connection: close",
        )
        return "\r\n".join((*lines, "", "")).encode("ascii")

    async def _receive(self, reader: asyncio.StreamReader, who: str, out: MemoryWriter) -> str | None:
        response = Response(who, self._limits.max_bytes)
        while not response.complete:
            try:
                async with asyncio.timeout(self._limits.idle_timeout):
                    data = await reader.read(_READ)
            except TimeoutError:
                raise ImageRefused(f"{who} sends nothing for {self._limits.idle_timeout:g} s") from None
            if data:
                response.feed(data)
            else:
                response.end()
            if response.location is not None:
                return response.location
            await _keep(response, out)
        return None


def _follow(place: WebAddress, location: str, asked: str) -> WebAddress:
    try:
        return place.follow(location)
    except ImageRefused:
        raise ImageRefused(f"{asked} redirects to what cannot be fetched") from None


async def _keep(response: Response, out: MemoryWriter) -> None:
    """What has come of the body."""
    if response.compressed:
        while parts := await asyncio.to_thread(response.take):
            out.write(parts)
    else:
        out.write(response.take())


def _agent() -> str:
    """The User-Agent: some servers give nothing to a client that has none."""
    try:
        return f"lightllmd/{version('lightllmd')}"
    except PackageNotFoundError:
        return "lightllmd"
