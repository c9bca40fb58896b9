"""A server of images may be slow, endless, lying or elsewhere: the client gets its image, or a 400 that says why."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

import tls_files
from image_servers import Answer, Names, Server, Source, endless, ok, redirect, serving, silent
from leftovers import no_new_descriptors, no_new_threads
from lightllmd.config.images import ImagesSettings
from lightllmd.errors import NotReady
from lightllmd.visual.fetch import Fetcher
from lightllmd.visual.image_file import ImageFile, ImageRefused
from lightllmd.visual.limits import DecodeLimits, FetchLimits
from lightllmd.visual.resolver import Resolve, SystemResolver

LOOPBACK = ("127.0.0.1/32",)
BODY = b"\x89PNG" + bytes(range(256)) * 40
FEW = 4096  # bytes


def limits(**changed: Any) -> FetchLimits:
    return FetchLimits(**{"allowed_networks": LOOPBACK, "timeout": 60.0, "idle_timeout": 60.0, **changed})


async def fetched(url: str, given: FetchLimits | None = None, resolve: Resolve | None = None, **options: Any) -> bytes:
    fetcher = Fetcher(given or limits(), resolve or Names(), **options)
    with await fetcher.fetch(Source(url=url)) as file:
        return file.read()


async def refusal(url: str, given: FetchLimits | None = None, resolve: Resolve | None = None, **options: Any) -> str:
    with pytest.raises(ImageRefused) as refused:
        await fetched(url, given, resolve, **options)
    assert refused.value.status == 400
    return refused.value.message


def run(coroutine: Any) -> Any:
    async def cleaned() -> Any:
        done = await coroutine
        await asyncio.sleep(0)  # transports that were let go close their sockets in the loop's next turn
        return done

    with no_new_descriptors():
        return asyncio.run(cleaned())


def answered(answer: Answer | bytes, given: FetchLimits | None = None) -> str:
    async def go() -> str:
        async with serving(answer) as server:
            return await refusal(server.url(), given)

    return run(go())


# --- what works ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        ok(BODY),
        ok(BODY, "Content-Type: text/html"),
        ok(BODY, length=False),
        ok(BODY, "Upgrade: h2,h2c", "Connection: Upgrade, close"),
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\nContent-Length: 9\r\n\r\n" + ok(BODY),
        ok(BODY) + b"and more, which nothing asked for",
        ok(b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY), "Transfer-Encoding: chunked", length=False),
        ok(gzip.compress(BODY), "Content-Encoding: gzip"),
        ok(zlib.compress(BODY), "Content-Encoding: deflate"),
        ok(gzip.compress(BODY), "Content-Encoding: gzip", length=False),
    ],
    ids=[
        "plain",
        "html",
        "to the end",
        "upgrade",
        "provisional",
        "more",
        "chunked",
        "gzip",
        "deflate",
        "gzip to the end",
    ],
)
def test_an_image_is_the_body_of_the_answer(answer: bytes) -> None:
    async def go() -> bytes:
        async with serving(answer) as server:
            return await fetched(server.url())

    assert run(go()) == BODY


def test_what_is_sent_names_the_host_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    async def go() -> tuple[bytes, int]:
        async with serving(ok(BODY)) as server:
            await fetched(server.url("/ä b?q=1#f", "Images.example."), resolve=Names(images_example=["127.0.0.1"]))
            return server.heads[0], server.port

    head, port = run(go())
    first, *fields = head.decode("ascii").split("\r\n")
    assert first == "GET /%C3%A4%20b?q=1 HTTP/1.1"
    assert {field.partition(":")[0].lower() for field in fields if field} == {
        "host",
        "user-agent",
        "accept",
        "accept-encoding",
        "connection",
    }
    assert f"Host: images.example.:{port}" in fields


def test_redirects_are_followed_as_far_as_may_be() -> None:
    async def go() -> tuple[bytes, list[bytes], str]:
        async with (
            serving(ok(BODY)) as last,
            serving(redirect(last.url("/c"), 307)) as middle,
            serving(redirect(middle.url("/b"), 303)) as first,
            serving(redirect("/b", 301)) as loop,
        ):
            return await fetched(first.url()), last.heads, await refusal(loop.url(), limits(max_redirects=2))

    body, heads, refused = run(go())
    assert body == BODY
    assert heads[0].startswith(b"GET /c ")
    assert refused == 'host "127.0.0.1" redirects more than 2 times, [images] max_redirects'


def test_the_next_address_is_tried_when_one_does_not_answer() -> None:
    async def go() -> bytes:
        async with serving(ok(BODY)) as server:
            names = Names(two_example=["127.0.0.2 127.0.0.1"])  # nothing listens at the first
            return await fetched(server.url(host="two.example"), limits(allowed_networks=("127.0.0.0/8",)), names)

    assert run(go()) == BODY


# --- addresses ------------------------------------------------------------------------------------------------------


def test_a_name_is_looked_up_once_and_connected_to_where_it_was_checked() -> None:
    """DNS that changes between check and use: the second answer is never asked for."""

    async def go() -> tuple[bytes, list[str]]:
        async with serving(ok(BODY)) as server:
            names = Names(rebinding_example=["127.0.0.1", "169.254.169.254"])
            return await fetched(server.url(host="rebinding.example"), resolve=names), names.asked

    assert run(go()) == (BODY, ["rebinding.example"])


def test_a_name_that_leads_inside_is_refused_in_the_words_of_one_that_is_not_there() -> None:
    async def go() -> list[str]:
        names = Names(inner_example=["10.0.0.7"], meta_example=["::ffff:169.254.169.254"])
        return [
            (await refusal(f"http://{name}.example/", FetchLimits(), names)).replace(name, "X")
            for name in ("inner", "meta", "missing")
        ]

    said = run(go())
    assert set(said) == {'host "X.example" has no address that is public or in [images] allowed_networks'}


def test_of_several_addresses_those_that_are_allowed_are_connected_to() -> None:
    async def go() -> tuple[bytes, int]:
        async with serving(ok(BODY)) as allowed:
            names = Names(mixed_example=["10.255.255.1 ::1 127.0.0.1"])
            return await fetched(allowed.url(host="mixed.example"), resolve=names), allowed.at_once

    assert run(go()) == (BODY, 1)


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "http://inner.example/",
        "http://nowhere.example/",
        "http://2852039166/",
        "file:///etc/passwd",
        "gopher://127.0.0.1/",
        "//10.0.0.1/x",
        "http://user:secret@127.0.0.1/",
        "http://[",
        "http://127.0.0.2/",
    ],
)
def test_a_redirect_inside_is_refused_without_naming_what_it_leads_to(location: str) -> None:
    async def go() -> str:
        async with serving(redirect(location)) as server:
            names = Names(outer_example=["127.0.0.1"], inner_example=["10.0.0.7"])
            return await refusal(server.url(host="outer.example"), resolve=names)

    said = run(go())
    assert 'host "outer.example" redirects to' in said
    assert not any(word in said for word in ("169.254", "inner", "nowhere", "10.0.0", "secret", "passwd", "127.0.0.2"))


def test_a_redirect_from_an_allowed_host_to_another_is_refused() -> None:
    async def go() -> tuple[str, str]:
        async with serving(ok(BODY)) as other, serving(redirect(other.url(host="b.example"))) as server:
            names = Names(a_example=["127.0.0.1"], b_example=["127.0.0.1"])
            given = limits(allowed_hosts=("a.example",))
            redirected = await refusal(server.url(host="a.example"), given, names)
            assert other.heads == []
            return redirected, await refusal(other.url(host="b.example"), given, names)

    redirected, direct = run(go())
    assert redirected == 'a server that host "a.example" redirects to may not be fetched from, or has no address'
    assert direct == 'host "b.example" is not among [images] allowed_hosts'


def test_an_address_that_is_not_public_is_named_as_the_client_named_it() -> None:
    said = run(refusal("http://[::1]:8000/", FetchLimits()))
    assert said == "address ::1 is not public, and not in [images] allowed_networks"


# --- bounds ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ok(b"x" * (FEW + 1)), f"sends more than {FEW} bytes, [images] max_bytes"),
        (ok(b"x" * (FEW + 1), length=False), f"sends more than {FEW} bytes"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999\r\n\r\n", f"sends more than {FEW} bytes"),
        (endless(b"x" * 1000), f"sends more than {FEW} bytes"),
        (endless(b"2\r\nxx\r\n", ok(b"", "Transfer-Encoding: chunked", length=False)), f"more than {FEW} bytes"),
        (
            endless(b"1;" + b"e" * 9000 + b"\r\nx\r\n", ok(b"", "Transfer-Encoding: chunked", length=False)),
            "in parts that are too small",
        ),
        (ok(gzip.compress(bytes(50_000_000), 1), "Content-Encoding: gzip"), f"sends more than {FEW} bytes"),
        (endless(b"\0\0\0\xff\xff", ok(b"\x78\x9c", "Content-Encoding: deflate", length=False)), "more than"),
        (endless(b"x", ok(gzip.compress(b""), "Content-Encoding: gzip", length=False)), f"more than {FEW} bytes"),
        (ok(b"no gzip", "Content-Encoding: gzip"), "sends a compressed body that is damaged"),
        (ok(BODY, "Content-Encoding: br"), 'in the encoding "br", which was not asked for'),
        (ok(BODY, "Content-Encoding: gzip, gzip"), 'in the encoding "gzip, gzip"'),
        (ok(BODY, "Transfer-Encoding: gzip, chunked", length=False), 'in the encoding "gzip, chunked"'),
        (endless(b"HTTP/1.1 100 Continue\r\n\r\n", b""), "answers with more than 65536 bytes of header"),
        (endless(b"X: y\r\n", b"HTTP/1.1 200 OK\r\n"), "answers with more than 65536 bytes of header"),
        (endless(b"x" * 1000, b"HTTP/1.1 200 OK\r\nX: "), "answers with more than 65536 bytes of header"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nx", "ends the connection after 1 bytes of the image"),
        (ok(b"5\r\nx", "Transfer-Encoding: chunked", length=False), "ends the connection after 1 bytes of the image"),
        (b"", "ends the connection without an answer"),
        (b"HTTP/1.1 200 OK\r\n", "ends the connection without an answer"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "does not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", "does not answer in HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc", "does not answer in HTTP"),
        (b"HTTP/1.1 101 Go on\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", "another protocol"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answers with status 404 (has no such file)"),
        (b"HTTP/1.1 500 Oh\r\n\r\n", "answers with status 500"),
        (b"HTTP/1.1 204 None\r\n\r\n", "answers with status 204"),
        (b"HTTP/1.1 206 Part\r\nContent-Length: 1\r\n\r\nx", "answers with status 206"),
        (b"HTTP/1.1 302 Found\r\n\r\n", "answers with status 302"),
    ],
)
def test_an_answer_that_is_too_large_or_no_answer_is_refused_by_name(answer: Answer | bytes, said: str) -> None:
    message = answered(answer, limits(max_bytes=FEW))
    assert message.startswith('host "127.0.0.1" ')
    assert said in message


@pytest.mark.parametrize(
    "answer", [silent(), silent(b"HTTP/1.1 200 OK\r\n"), silent(ok(b"x", "Content-Length: 5", length=False))]
)
def test_a_server_that_falls_silent_is_given_up(answer: Answer) -> None:
    assert answered(answer, limits(idle_timeout=0.05)) == 'host "127.0.0.1" sends nothing for 0.05 s'


def test_a_server_that_never_falls_silent_is_given_up_too() -> None:
    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(ok(b"", length=False))
        while not writer.is_closing():
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.01)  # the pace of the server

    said = answered(drip, limits(timeout=0.2))
    assert said == 'host "127.0.0.1" takes more than 0.2 s, [images] timeout'


def test_redirects_and_look_ups_share_one_time() -> None:
    async def never(_: str) -> list[Any]:
        await asyncio.get_running_loop().create_future()
        return []

    async def go() -> tuple[str, str]:
        async with serving(silent()) as slow, serving(redirect(slow.url())) as server:
            given = limits(timeout=0.1)
            return await refusal(server.url(), given), await refusal("http://slow.example/", given, never)

    redirected, looked_up = run(go())
    assert redirected == 'a server that host "127.0.0.1" redirects to takes more than 0.1 s, [images] timeout'
    assert looked_up == 'host "slow.example" takes more than 0.1 s, [images] timeout'


def test_a_port_at_which_nothing_listens_is_told() -> None:
    async def go() -> str:
        async with serving(b"") as server:
            url = server.url()
        return await refusal(url)

    assert run(go()) == 'host "127.0.0.1" cannot be connected to'


def test_urls_can_be_switched_off() -> None:
    said = run(refusal("http://a.example/", limits(urls=False)))
    assert said == 'its URL "http://a.example/" is not fetched: [images] urls is false'


def test_so_many_are_fetched_at_a_time_and_the_first_refusal_ends_all() -> None:
    async def go() -> None:
        waiting, enough, go_on = 0, asyncio.Event(), asyncio.Event()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal waiting
            waiting += 1
            if waiting == 5:
                enough.set()
            await go_on.wait()
            writer.write(ok(BODY))
            await writer.drain()

        async with serving(answer) as good, serving(b"HTTP/1.1 410 Gone\r\n\r\n") as bad:
            fetcher = Fetcher(limits(fetches=5, request_fetches=3), Names())
            urls = [(Source(url=good.url()), -1)] * 20
            requests = [asyncio.create_task(fetcher.fetch_all(urls)) for _ in range(2)]
            await enough.wait()
            go_on.set()
            files = [file for request in requests for file in await request]
            assert len(files) == 40
            assert good.at_once <= 5
            for file in files:
                file.close()

            with pytest.raises(ImageRefused, match="410") as refused:
                await fetcher.fetch_all([*urls, (Source(url=bad.url()), -1), *urls])
            assert refused.value.parameters["index"] == 20

            go_on.clear()
            request = asyncio.create_task(fetcher.fetch_all(urls))
            while not good.open:
                await asyncio.sleep(0.001)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request

    run(go())


def test_no_more_is_held_than_may_be_and_what_is_let_go_counts_no_more() -> None:
    async def go() -> None:
        async with serving(ok(BODY)) as server:
            source = (Source(url=server.url()), -1)
            fetcher = Fetcher(limits(held_bytes=5 * len(BODY), request_bytes=3 * len(BODY)), Names())
            with pytest.raises(
                ImageRefused, match=f"images of the request have more than {3 * len(BODY)} bytes together"
            ):
                await fetcher.fetch_all([source] * 4)
            assert fetcher.held.held == 0
            files = [*await fetcher.fetch_all([source] * 3), *await fetcher.fetch_all([source] * 2)]
            with pytest.raises(NotReady, match=f"images of {5 * len(BODY)} bytes are held"):
                await fetcher.fetch_all([source])
            files.pop().close()
            files += await fetcher.fetch_all([source])
            for file in files:
                file.close()
            assert fetcher.held.held == 0

    run(go())


def test_limits_are_what_the_operator_has_set() -> None:
    settings = ImagesSettings(
        timeout=3.0, allowed_networks=["10.0.0.0/8"], file_root="/srv", max_bytes=1 << 30, max_pixels=7
    )
    fetching, decoding = FetchLimits.of(settings), DecodeLimits.of(settings)
    assert (fetching.timeout, fetching.allowed_networks, fetching.file_root) == (3.0, ("10.0.0.0/8",), "/srv")
    assert fetching.max_bytes == decoding.max_bytes == fetching.request_bytes == 1 << 30
    assert decoding.max_pixels == 7
    assert FetchLimits.of(ImagesSettings()) == FetchLimits()
    assert DecodeLimits.of(ImagesSettings()) == DecodeLimits()


# --- TLS ------------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def serving_tls(made: tls_files.Made) -> AsyncIterator[Server]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made.certificate, made.key)
    async with serving(ok(BODY), context) as server:
        yield server


def test_a_certificate_has_to_be_trusted_and_for_the_host_of_the_url(tmp_path: Path) -> None:
    made = tls_files.make(tmp_path)  # for localhost and 127.0.0.1

    async def go() -> None:
        names = Names(localhost=["127.0.0.1"], other_example=["127.0.0.1"])
        async with serving_tls(made) as server, serving(ok(BODY), unasked=True) as plain:
            for host in ("localhost", "LOCALHOST.", "127.0.0.1"):
                url = server.url(host=host, scheme="https")
                assert await fetched(url, resolve=names, trust=made.client()) == BODY
            other = await refusal(server.url(host="other.example", scheme="https"), resolve=names, trust=made.client())
            assert other.startswith('host "other.example" has a certificate that does not do: Hostname mismatch')
            unknown = await refusal(server.url(scheme="https"))
            assert "has a certificate that does not do: self-signed certificate" in unknown
            said = await refusal(plain.url(scheme="https"))
            assert said == 'host "127.0.0.1" does not speak TLS as it should'

    run(go())


# --- the system's resolver --------------------------------------------------------------------------------------------


def test_names_are_looked_up_by_the_system_without_holding_up_the_loop() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def go() -> None:
        loop, hang = asyncio.get_running_loop(), asyncio.Future()

        def look_up(host: str, *_: Any, **__: Any) -> list[tuple]:
            loop.call_soon_threadsafe(started.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            if host == "missing.example":
                raise OSError
            return [(0, 0, 0, "", ("8.8.8.8", 0)), (0, 0, 0, "", ("8.8.8.8", 0)), (0, 0, 0, "", ("fe80::1%lo", 0))]

        resolve = SystemResolver(1, look_up)
        given_up = asyncio.create_task(resolve("slow.example"))
        await started.wait()
        given_up.cancel()
        behind = asyncio.create_task(resolve("a.example"))  # waits for the one thread
        missing = asyncio.create_task(resolve("missing.example"))
        go_on.set()
        assert await behind == [ip_address("8.8.8.8"), ip_address("fe80::1%lo")]
        assert await missing == []
        hang.cancel()
        assert ip_address("127.0.0.1") in await SystemResolver()("localhost")

    with no_new_threads():
        run(go())


def test_a_file_that_nothing_waits_for_is_let_go() -> None:
    with no_new_descriptors():
        ImageFile.of(b"x")
