"""No image is fetched from an address that is not public, however it is written, unless the operator allows it."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from lightllmd.visual.image_file import ImageRefused
from lightllmd.visual.limits import FetchLimits
from lightllmd.visual.policy import AddressPolicy, host_name
from lightllmd.visual.web_address import MAX_URL, WebAddress

PUBLIC = ["8.8.8.8", "93.184.216.34", "1.1.1.1", "172.32.0.1", "100.128.0.1", "192.0.1.1", "2606:4700::1111"]
PUBLIC_EMBEDDED = ["::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
NOT_PUBLIC = {
    "unspecified": ["0.0.0.0", "::", "0.1.2.3"],
    "loopback": ["127.0.0.1", "127.255.255.254", "::1"],
    "private": ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "fc00::1", "fdff::1"],
    "link-local": ["169.254.0.1", "fe80::1", "febf::1", "fec0::1"],
    "metadata": [
        "169.254.169.254",
        "169.254.170.2",
        "fd00:ec2::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    ],
    "shared": ["100.64.0.1", "100.127.255.255"],
    "multicast": ["224.0.0.1", "239.255.255.250", "ff02::1"],
    "reserved": ["240.0.0.1", "255.255.255.255", "192.0.0.8", "198.18.0.1", "198.19.255.255", "192.88.99.1"],
    "documentation": ["192.0.2.1", "198.51.100.1", "203.0.113.1", "2001:db8::1", "3fff::1"],
    "mapped": ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:10.0.0.1", "::ffff:0:10.0.0.1"],
    "compatible": ["::127.0.0.1", "::8.8.8.8"],
    "NAT64": ["64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808"],
    "6to4": ["2002:7f00:1::1", "2002:a9fe:a9fe::1", "2002:a00:1::"],
    "Teredo": ["2001:0:808:808::1"],
    "ISATAP": ["2606:4700::5efe:10.0.0.1", "2606:4700::200:5efe:127.0.0.1"],
    "not assigned": ["4000::1", "5f00::1", "100::1"],
}


@pytest.mark.parametrize("text", [*PUBLIC, *PUBLIC_EMBEDDED])
def test_public_addresses_are_fetched_from(text: str) -> None:
    assert AddressPolicy(FetchLimits()).allows(ip_address(text))


@pytest.mark.parametrize("kind", NOT_PUBLIC)
def test_others_are_not(kind: str) -> None:
    policy = AddressPolicy(FetchLimits())
    assert [text for text in NOT_PUBLIC[kind] if policy.allows(ip_address(text))] == []


def test_a_network_is_allowed_without_the_metadata_services_in_it() -> None:
    policy = AddressPolicy(FetchLimits(allowed_networks=("169.254.0.0/16", "fd00::/8", "10.1.0.0/16", "0.0.0.0/0")))
    assert policy.allows(ip_address("169.254.1.1"))
    assert policy.allows(ip_address("::ffff:10.1.2.3"))
    assert policy.allows(ip_address("fd00::5"))
    for metadata in ("169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "168.63.129.16"):
        assert not policy.allows(ip_address(metadata))
    assert AddressPolicy(FetchLimits(allowed_networks=("169.254.169.254/32",))).allows(ip_address("169.254.169.254"))


def test_a_public_address_of_this_host_is_not_fetched_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightllmd.visual.policy._NOT_PUBLIC", [])  # as if loopback were an address of the net
    assert not AddressPolicy(FetchLimits()).allows(ip_address("127.0.0.1"))


@pytest.mark.parametrize(
    "host",
    [
        "0x7f.0.0.1",
        "0x7f000001",
        "2130706433",
        "017700000001",
        "0177.0.0.1",
        "127.1",
        "127.0.1",
        "127.0.0.01",
        "127.0.0.0x1",
        "1.2.3.4.5",
        "256.0.0.1",
        "example.0x7f",
        "①②⑦.1",
        "a..b",
        ".",
        "",
        "-a.de",
        "a%00b",
        "127.0.0.1%2f",
        "a b",
        "a" * 64,
        "a." * 127,
        "[::1",
        "[fe80::1%25eth0]",
        "[fe80::1%eth0]",
        "[127.0.0.1]",
        "[::1]x",
    ],
)
def test_hosts_that_programs_read_differently_are_refused(host: str) -> None:
    with pytest.raises(ImageRefused, match=r"host|IPv6"):
        host_name(host)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Example.ORG", "example.org"),
        ("example.org.", "example.org."),
        ("bücher.example", "xn--bcher-kva.example"),
        ("①②⑦.⓪.⓪.①", "127.0.0.1"),
        ("１６９。２５４。169.254", "169.254.169.254"),
        ("ⓛocalhost", "localhost"),
        ("[::FFFF:7f00:1]", "::ffff:7f00:1"),
        ("a_b.example", "a_b.example"),
    ],
)
def test_names_are_read_as_browsers_read_them(written: str, read: str) -> None:
    name, address = host_name(written)
    assert name == read or ip_address(name) == ip_address(read)
    assert (address is not None) == (read[0].isdigit() or ":" in read)


def test_hosts_are_allowed_by_name_whatever_their_spelling() -> None:
    policy = AddressPolicy(
        FetchLimits(allowed_hosts=("Images.example.org.", "*.cdn.example.org", "[2606:4700::1]", "8.8.8.8"))
    )
    for host in ("images.example.org", "images.example.org.", "a.b.cdn.example.org", "2606:4700::1", "8.8.8.8"):
        policy.check_host(host)
    for host in ("example.org", "cdn.example.org", "images.example.org.evil.net", "evilcdn.example.org", "8.8.4.4"):
        with pytest.raises(ImageRefused, match=r'host ".*" is not among \[images\] allowed_hosts'):
            policy.check_host(host)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://example.org/a.png", 'scheme of its URL is "ftp"; http, https and data'),
        ("file:///etc/passwd", 'scheme of its URL is "file"'),
        ("gopher://127.0.0.1:6379/_INFO", 'scheme of its URL is "gopher"'),
        ("javascript:alert(1)", 'scheme of its URL is "javascript"'),
        ("example.org/a.png", "has no scheme"),
        ("//example.org/a.png", "has no scheme"),
        ("", "has no scheme"),
        ("http:/example.org", "names no host"),
        ("http:example.org", "names no host"),
        ("http://", "names no host"),
        ("http:///a.png", "names no host"),
        ("http://:80/", "names no host"),
        ("http://user@example.org/", "user name or a password"),
        ("http://example.org@127.0.0.1/", "user name or a password"),
        ("http://example.org:pw@127.0.0.1/", "user name or a password"),
        ("http://example.org\\@127.0.0.1/", "backslash or a control character"),
        ("http://127.0.0.1\\.example.org/", "backslash or a control character"),
        ("http://example.org/\r\nX: y", "backslash or a control character"),
        ("http://exa\tmple.org/", "backslash or a control character"),
        ("http://example.org:0/", "port of its URL is 0; 1 … 65535"),
        ("http://example.org:65536/", "port of its URL is 65536"),
        ("http://example.org:8o/", "names no host"),
        ("http://a:1:2/", "names no host"),
        ("http://[::1]:80:80/", "names no host"),
        ("http://example.org/" + "a" * MAX_URL, f"at most {MAX_URL}"),
    ],
)
def test_urls_that_lead_nowhere_or_astray_are_refused_by_name(url: str, said: str) -> None:
    with pytest.raises(ImageRefused) as refused:
        WebAddress.of(url)
    assert said in refused.value.message
    assert len(refused.value.message) < 300


def test_a_url_is_asked_for_as_it_is_written() -> None:
    place = WebAddress.of("  HTTPS://Bücher.example.:8443/ü b/%41?q=ä&r=1/2#part ")
    assert (place.scheme, place.host, place.port) == ("https", "xn--bcher-kva.example.", 8443)
    assert place.target == "/%C3%BC%20b/%41?q=%C3%A4&r=1/2"
    assert place.server_name == "xn--bcher-kva.example"
    assert place.host_field == "xn--bcher-kva.example.:8443"
    assert WebAddress.of("http://example.org?q").target == "/?q"
    assert WebAddress.of("http://[2606:4700::1]/").host_field == "[2606:4700::1]"


def test_a_redirect_is_read_against_the_url_that_it_is_of() -> None:
    place = WebAddress.of("https://example.org/a/b.png?q")
    assert place.follow("../c.png").url == "https://example.org/c.png"
    assert place.follow("//other.example/d").url == "https://other.example/d"
    assert place.follow("http://169.254.169.254/").host == "169.254.169.254"
    for location in ("file:///etc/passwd", "http://[", "data:,x", "http://a@b/"):
        with pytest.raises(ImageRefused):
            place.follow(location)
