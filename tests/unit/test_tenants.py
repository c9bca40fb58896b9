"""Whose a request is."""

from __future__ import annotations

import pytest

from lightllmd.api.web.tenants import KEY, Tenants
from lightllmd.config.keys import ApiKey
from lightllmd.config.parameters import HttpSettings


def tenant(address: str, *forwarded: str, key: bytes | None = None, **settings: object) -> int:
    scope = {"client": (address, 1), "headers": [(b"x-forwarded-for", value.encode()) for value in forwarded]}
    return Tenants(HttpSettings(**settings)).of(scope if key is None else scope | {KEY: ApiKey(sha256=key.hex())})


def test_a_key_is_a_client_wherever_it_comes_from() -> None:
    assert tenant("10.0.0.1", key=b"a") == tenant("10.0.0.2", key=b"a")
    assert len({tenant("10.0.0.1", key=b"a"), tenant("10.0.0.1", key=b"b"), tenant("10.0.0.1")}) == 3


def test_without_keys_an_address_is_a_client_and_in_ipv6_a_network() -> None:
    assert tenant("10.0.0.1") != tenant("10.0.0.2")
    assert tenant("::ffff:10.0.0.1") == tenant("10.0.0.1")
    assert tenant("2001:db8::1") == tenant("2001:db8::2:3")
    assert tenant("2001:db8::1") != tenant("2001:db8:0:1::1")


def test_x_forwarded_for_is_believed_from_trusted_proxies_alone() -> None:
    assert tenant("10.0.0.1", "192.0.2.7") == tenant("10.0.0.1")
    trusted = {"trusted_proxies": ["10.0.0.0/8"]}
    assert tenant("10.0.0.1", "192.0.2.7", **trusted) == tenant("192.0.2.7")
    assert tenant("10.0.0.1", "203.0.113.9, 192.0.2.7 ,10.1.1.1", **trusted) == tenant("192.0.2.7")
    assert tenant("10.0.0.1", "203.0.113.9", "192.0.2.7", **trusted) == tenant("192.0.2.7")
    assert tenant("192.0.2.8", "192.0.2.7", **trusted) == tenant("192.0.2.8")


@pytest.mark.parametrize("forwarded", [[], [""], ["unknown"], ["x" * 10_000], [","]])
def test_a_proxy_that_says_nothing_of_use_is_the_client(forwarded: list[str]) -> None:
    assert tenant("10.0.0.1", *forwarded, trusted_proxies=["10.0.0.1"]) == tenant("10.0.0.1")


def test_all_are_one_client_where_admission_is_not_fair() -> None:
    assert tenant("10.0.0.1", key=b"a", fair_admission=False) == tenant("10.0.0.2", fair_admission=False) == 0


def test_clients_of_a_unix_socket_are_one_unless_its_proxy_is_trusted() -> None:
    def local(*forwarded: str, **settings: object) -> int:
        headers = [(b"x-forwarded-for", value.encode()) for value in forwarded]
        return Tenants(HttpSettings(**settings)).of({"client": None, "headers": headers})

    assert local("192.0.2.7") == local("192.0.2.8") == local()
    trusted = {"trusted_proxies": ["unix", "10.0.0.0/8"]}
    assert local("192.0.2.7", **trusted) == local("192.0.2.7, 10.1.1.1", **trusted) == tenant("192.0.2.7")
    assert local("192.0.2.8", **trusted) != local("192.0.2.7", **trusted)
    assert local(**trusted) == local("nonsense", **trusted) == local()
