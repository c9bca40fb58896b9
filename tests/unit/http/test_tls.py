"""TLS on real sockets: contexts that change under open connections, and handshakes that don't come to an end."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lightllmd.config import tls
from tls_files import Made, make
from unit.http.http_scene import GET, Served, run, serving, status, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def server(folder: Path) -> Made:
    return make(folder)


@pytest.fixture(scope="module")
def other(folder: Path) -> Made:
    return make(folder, "other")


def context(made: Made, client_ca: Path | None = None) -> ssl.SSLContext:
    return tls.context(tls.read(str(made.certificate), str(made.key), str(client_ca or "")))


@asynccontextmanager
async def serving_tls(made: Made, **bounds: Any):
    async with serving(**bounds) as served:
        served.tls = context(made)
        yield served


async def connect(served: Served, client: ssl.SSLContext):
    return await asyncio.open_connection("127.0.0.1", served.port, ssl=client)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    writer.write(GET)
    return status(await reader.readuntil(b"\r\n\r\n0"))


def test_a_changed_certificate_serves_new_connections_and_leaves_the_old_ones(server: Made, other: Made) -> None:
    async def test() -> None:
        async with serving_tls(server) as served:
            old = await connect(served, server.client())
            assert await ask(*old) == 200
            served.tls = context(other)
            assert await ask(*old) == 200
            with pytest.raises(ssl.SSLCertVerificationError):
                await connect(served, server.client())
            new = await connect(served, other.client())
            assert await ask(*new) == 200
            assert await ask(*old) == 200
            for _, writer in (old, new):
                writer.close()

    run(test)


def test_header_and_body_in_records_of_their_own_are_one_request(server: Made) -> None:
    async def test() -> None:
        async with serving_tls(server) as served:
            reader, writer = await connect(served, server.client())
            tcp = writer.transport.get_extra_info("socket")
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)  # both arrive together
            writer.write(b"POST /answer HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n")
            writer.write(b"abc")
            tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 0)
            assert status(await reader.readuntil(b"\r\n\r\n3")) == 200
            writer.close()

    run(test)


@pytest.mark.parametrize(("version", "serves"), [("TLSv1_1", False), ("TLSv1_2", True), ("TLSv1_3", True)])
def test_tls_1_2_is_the_oldest(server: Made, version: str, serves: bool) -> None:
    async def test() -> None:
        async with serving_tls(server) as served:
            client = server.client()
            client.set_ciphers("DEFAULT:@SECLEVEL=0")  # which would refuse old versions by itself
            with warnings.catch_warnings(action="ignore"):
                client.minimum_version = client.maximum_version = ssl.TLSVersion[version]
            if serves:
                _, writer = await connect(served, client)
                assert writer.get_extra_info("ssl_object").version() == version.replace("_", ".")
                writer.close()
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await connect(served, client)

    run(test)


def test_clients_without_a_certificate_are_refused_where_one_is_needed(server: Made, other: Made, folder: Path) -> None:
    authority = make(folder, "authority")
    member = make(folder, "member", signer=authority)

    async def test() -> None:
        async with serving(connections=10) as served:
            served.tls = context(server, authority.certificate)
            for given in (None, other, member):
                client = server.client()
                if given is not None:
                    client.load_cert_chain(given.certificate, given.key)
                if given is member:
                    reader, writer = await connect(served, client)
                    assert await ask(reader, writer) == 200
                    writer.close()
                    continue
                with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                    await ask(*await connect(served, client))
            await until(lambda: not served.traffic.handshakes)
            assert served.app.called == ["/answer"]

    run(test)


def test_silent_handshakes_give_way_to_others_and_are_counted(server: Made) -> None:
    async def test() -> None:
        async with serving_tls(server, connections=4) as served:
            silent = []
            for number in range(4):
                silent.append(await served.connect(b"\x16\x03"))  # the beginning of a handshake
                await until(lambda count=number + 1: served.traffic.handshakes == count)
            reader, writer = await connect(served, server.client())
            assert await ask(reader, writer) == 200
            assert await silent[0].rest() == b""
            assert served.traffic.handshakes == 3
            writer.close()
            await until(lambda: not served.traffic.connections)
            assert len(served.traffic.waiting) == 3

    run(test)


def test_a_handshake_has_as_long_as_a_header(server: Made) -> None:
    async def test() -> None:
        async with serving_tls(server, header_timeout=0.2) as served:
            silent = await served.connect(b"\x16\x03")
            assert await silent.rest() == b""
            await until(lambda: not served.traffic.handshakes)
            assert not served.traffic.waiting

    run(test)


@pytest.mark.parametrize("data", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", b"\0" * 1000])
def test_what_is_no_tls_is_closed_and_leaves_nothing(server: Made, data: bytes) -> None:
    async def test() -> None:
        async with serving_tls(server, header_timeout=0.5) as served:
            client = await served.connect(data)
            await client.rest()
            await until(lambda: not served.traffic.handshakes)
            assert not served.app.called
            assert not served.traffic.waiting

    run(test)
