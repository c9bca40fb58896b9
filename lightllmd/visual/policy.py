"""Which hosts and addresses images may be fetched from.

A URL names a host, a look-up gives its addresses, and every one of them has to pass before one is connected to: that
very address, so that a later look-up changes nothing. What is not public is named here by the registries of special
addresses (https://www.iana.org/assignments/iana-ipv4-special-registry, …-ipv6-special-registry) rather than by the
`is_global` of `ipaddress`, whose answers differ between releases of Python.
"""

from __future__ import annotations

import re
import socket
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from lightllmd.errors import show
from lightllmd.visual.image_file import ImageRefused
from lightllmd.visual.limits import FetchLimits

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NOT_PUBLIC = [
    ip_network(text)
    for text in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # shared: carriers' NAT, and some clouds' metadata
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.88.99.0/24",  # relays of 6to4
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, broadcast
        "2001::/23",  # protocol assignments: Teredo, ORCHID, benchmarks
        "2001:db8::/32",  # documentation
        "3fff::/20",  # documentation
    )
]
_PUBLIC_6 = IPv6Network("2000::/3")  # all else is loopback, unique local, link-local, multicast, or not assigned
# IPv6 addresses that stand for an IPv4 one, which is looked at instead: the network, and where in the address it is.
_EMBEDDED = (
    (IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (IPv6Network("::ffff:0:0:0/96"), 0),  # translated (SIIT)
    (IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (IPv6Network("2002::/16"), 80),  # 6to4
)
_ISATAP = (0x00005EFE, 0x02005EFE)  # bits 32 to 63 of an address whose last 32 are an IPv4 one
# A network that holds one of these among others doesn't allow it: it has to be named by itself.
_METADATA = [
    ip_address(text)
    for text in (
        "169.254.169.254",  # most clouds
        "169.254.170.2",  # Amazon's containers
        "169.254.170.23",
        "100.100.100.200",  # Alibaba
        "168.63.129.16",  # Azure; it looks public
        "192.0.0.192",  # Oracle
        "fd00:ec2::254",  # Amazon
        "fd00:ec2::23",
        "fd20:ce::254",  # Google
    )
]
_NAME = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LONGEST_NAME = 253


class AddressPolicy:
    """Of one set of limits. Every method that refuses raises ImageRefused."""

    def __init__(self, limits: FetchLimits) -> None:
        """Raises ValueError when a network of `limits` is none."""
        self._hosts = {host.lower().strip("[]").rstrip(".") for host in limits.allowed_hosts}
        self._networks = [ip_network(text, strict=False) for text in limits.allowed_networks]

    def check_host(self, host: str) -> None:
        """`host` as `host_name` makes it: whether the operator allows it by name."""
        if self._hosts and not any(_covers(pattern, host.rstrip(".")) for pattern in self._hosts):
            raise ImageRefused(f"host {show(host)} is not among [images] allowed_hosts")

    def allows(self, address: Address) -> bool:
        """Whether `address` may be connected to."""
        address = embedded(address)
        if address in _METADATA:
            return any(net.num_addresses == 1 and address in net for net in self._networks)
        if any(address in net for net in self._networks):
            return True
        if isinstance(address, IPv6Address) and address not in _PUBLIC_6:
            return False
        return not any(address in net for net in _NOT_PUBLIC) and not _own(address)


def embedded(address: Address) -> Address:
    """The IPv4 address that an IPv6 one stands for, or `address`."""
    if isinstance(address, IPv6Address):
        number = int(address)
        for network, shift in _EMBEDDED:
            if address in network:
                return IPv4Address(number >> shift & 0xFFFFFFFF)
        if number >> 32 & 0xFFFFFFFF in _ISATAP:
            return IPv4Address(number & 0xFFFFFFFF)
        if address.scope_id:
            return IPv6Address(number)
    return address


def host_name(text: str) -> tuple[str, Address | None]:
    """A URL's host as it is looked up, in ASCII and lower case, and its address where it is one in digits.

    An address is taken in the one form that every program reads alike: four decimal numbers without leading zeros, or
    IPv6 in brackets without a zone. Raises ImageRefused.
    """
    if text.startswith("["):
        return _ipv6(text)
    try:
        name = text.lower() if text.isascii() else _to_ascii(text)
    except UnicodeError:
        raise ImageRefused(f"host {show(text)} is no name that can be looked up") from None
    labels = name.removesuffix(".").split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return name, IPv4Address(name)
        except ValueError:
            raise ImageRefused(
                f"host {show(text)} is neither a name nor an address of four decimal numbers, such as 192.0.2.1"
            ) from None
    if len(name) > _LONGEST_NAME or not all(_NAME.fullmatch(label) for label in labels):
        raise ImageRefused(f"host {show(text)} is no name that can be looked up")
    return name, None


def _ipv6(text: str) -> tuple[str, Address]:
    try:
        if "%" in text or not text.endswith("]"):
            raise ValueError
        address = IPv6Address(text[1:-1])
    except ValueError:
        raise ImageRefused(f"host {show(text)} is no IPv6 address") from None
    return str(address), address


def _to_ascii(text: str) -> str:
    """By UTS 46, as browsers do. Raises UnicodeError."""
    import idna

    return idna.encode(text, uts46=True).decode("ascii").lower()


def _covers(pattern: str, host: str) -> bool:
    return host.endswith(pattern[1:]) if pattern.startswith("*.") else host == pattern


def _own(address: Address) -> bool:
    """Whether it is an address of this host: what listens there may be open to this host alone."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), 9))  # sends nothing: it chooses a route, and with it our end's address
            return ip_address(probe.getsockname()[0]) == address
        except OSError:
            return False  # no route: a connection won't be made either
