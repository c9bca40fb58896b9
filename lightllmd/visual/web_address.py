"""From an http or https URL to what is looked up, connected to and asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, urljoin

from lightllmd.errors import show
from lightllmd.visual.image_file import ImageRefused
from lightllmd.visual.policy import Address, host_name

MAX_URL = 8 << 10  # characters
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_AUTHORITY = re.compile(r"//([^/?#]*)([^#]*)")
_HOST_PORT = re.compile(r"(\[[^]]*\]|[^:\[\]]*)(?::([0-9]{0,5}))?")
_CONTROLS = re.compile(r"[\x00-\x1f\x7f\\]")
_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535
_PLAIN = "".join(chr(code) for code in range(33, 127))  # what is left as it is in a path


@dataclass(frozen=True)
class WebAddress:
    """`host` as it is looked up, an address without brackets; `address`: where it is one in digits."""

    url: str
    scheme: str  # "http" | "https"
    host: str
    address: Address | None
    port: int
    target: str  # path and query, in ASCII

    @classmethod
    def of(cls, url: str) -> WebAddress:
        """Raises ImageRefused, with what is wrong of `url`."""
        url = url.strip(" \t\r\n")
        if len(url) > MAX_URL:
            raise ImageRefused(f"its URL has {len(url)} characters, at most {MAX_URL} may be")
        if _CONTROLS.search(url):
            raise ImageRefused(f"its URL {show(url)} has a backslash or a control character in it")
        scheme = scheme_of(url)
        if scheme not in _PORTS:
            named = f"the scheme of its URL is {show(scheme)}" if scheme else f"its URL {show(url)} has no scheme"
            raise ImageRefused(f"{named}; http, https and data can be used")
        parts = _AUTHORITY.fullmatch(url[len(scheme) + 1 :].partition("#")[0])
        if parts is None:
            raise ImageRefused(f"its URL {show(url)} names no host")
        if "@" in parts[1]:
            raise ImageRefused("its URL has a user name or a password before the host; neither can be used")
        place = _HOST_PORT.fullmatch(parts[1])
        if place is None or not place[1]:
            raise ImageRefused(f"its URL {show(url)} names no host")
        port = int(place[2]) if place[2] else _PORTS[scheme]
        if not 0 < port <= _MAX_PORT:
            raise ImageRefused(f"the port of its URL is {port}; 1 … {_MAX_PORT} are possible")
        host, address = host_name(place[1])
        target = quote(parts[2], safe=_PLAIN)
        return cls(url, scheme, host, address, port, target if target.startswith("/") else f"/{target}")

    def follow(self, location: str) -> WebAddress:
        """Where a redirect from here leads. Raises ImageRefused."""
        try:
            joined = urljoin(self.url, location.strip(" \t"))
        except ValueError:
            raise ImageRefused("its server redirects to what is no URL") from None
        return WebAddress.of(joined)

    @property
    def server_name(self) -> str:
        """What a TLS certificate has to be for."""
        return self.host if self.address is not None else self.host.removesuffix(".")

    @property
    def host_field(self) -> str:
        """The value of HTTP's header field Host."""
        host = f"[{self.host}]" if self.address is not None and self.address.version == 6 else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


def scheme_of(url: str) -> str:
    """In lower case; empty where there is none."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""
