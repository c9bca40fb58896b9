"""Whose a request is, where admission is fair between clients: a number that stands for an API key or an address."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

from starlette.types import Scope

from lightllmd.config.keys import ApiKey
from lightllmd.config.parameters import HttpSettings
from lightllmd.config.rules import UNIX
from lightllmd.errors import InvalidRequest
from lightllmd.requests.urgency import Turn, Urgency

KEY = "lightllmd.key"  # in a scope: the ApiKey that the request was admitted with
_PREFIX = 64  # bits of an IPv6 address that one client has for itself


class Tenants:
    """As the settings say: fair admission or not, and which proxies to believe."""

    def __init__(self, http: HttpSettings) -> None:
        self._fair = http.fair_admission
        self._unix = UNIX in http.trusted_proxies
        self._proxies = [ip_network(written, strict=False) for written in http.trusted_proxies if written != UNIX]

    def of(self, scope: Scope) -> int:
        """0 for all where admission is not fair."""
        if not self._fair:
            return 0
        key: ApiKey | None = scope.get(KEY)
        return _number(f"key:{key.identity}" if key is not None else f"address:{self._client(scope)}")

    def turn(self, scope: Scope, urgency: Urgency) -> Turn:
        """Of a request, with its priority as its key allows it. Raises InvalidRequest for one that is too urgent."""
        key: ApiKey | None = scope.get(KEY)
        if key is None:
            return Turn(self.of(scope), urgency=urgency)
        priority = urgency.priority
        if priority is None:
            priority = max(0, key.priority)
        elif priority < key.priority:
            message = f"priority: the key's requests may have {key.priority} or more, which is later; got {priority}"
            raise InvalidRequest(message, param="priority")
        return Turn(self.of(scope), key.weight, replace(urgency, priority=priority))

    def address(self, scope: Scope) -> str:
        """Of the client, in words for a log."""
        return self._client(scope) or "a local client"

    def _client(self, scope: Scope) -> str:
        """The client's address or, in IPv6, its network. X-Forwarded-For is believed as far as trusted proxies wrote
        it: each appends the address that it was connected from."""
        peer = (scope.get("client") or ("",))[0]
        address = _address(peer)
        if self._proxies or self._unix:
            lists = [value.decode("latin-1") for name, value in scope["headers"] if name == b"x-forwarded-for"]
            hops = ",".join(lists).split(",")
            if self._unix and not peer:
                address = _address(hops.pop().strip())
            while hops and address is not None and any(address in network for network in self._proxies):
                before = _address(hops.pop().strip())
                if before is None:
                    break
                address = before
        if address is None:
            return peer
        return str(ip_network((address, _PREFIX), strict=False) if address.version == 6 else address)


def _address(written: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(written)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
