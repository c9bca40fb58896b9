"""How requests and their answers end, whichever side closes, and however their bytes were cut."""

from __future__ import annotations

import asyncio
import random
import re
import socket

import pytest

from unit.http.http_scene import (
    GET,
    run,
    serving,
    status,
    until,
)


@pytest.mark.parametrize("path", [b"/late", b"/stream"])
def test_a_client_that_closed_its_sending_side_alone_gets_its_whole_answer(path):
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(GET.replace(b"/answer", path))
            connection = await until(lambda: next(iter(served.traffic.connections), None))
            await until(lambda: served.app.called)
            client.sock.shutdown(socket.SHUT_WR)
            await until(lambda: connection._half_closed)
            for seconds in (1, 3, 7, 15):
                served.later(seconds)
            assert connection in served.traffic.connections
            served.app.go_on.set()
            answer = await client.rest()
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"\r\n\r\n0" if path == b"/late" else b"three\r\n0\r\n\r\n")
            assert answer.count(b"HTTP/1.1") == 1

    run(test)


def test_a_client_that_closed_both_directions_cancels_its_request():
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(GET.replace(b"/answer", b"/wait"))
            await until(lambda: served.app.called)
            client.sock.close()
            await until(lambda: served.later(0) or served.app.gone == ["/wait"])
            assert not served.traffic.connections

    run(test)


def test_a_client_that_sent_more_and_then_closed_cancels_its_request():
    """What it sent behind its request is not read, so that its end is not either."""

    async def test() -> None:
        async with serving() as served:
            client = await served.connect(GET.replace(b"/answer", b"/wait") + GET)
            await until(lambda: served.app.called)
            client.sock.close()
            await until(lambda: served.later(0) or served.app.gone == ["/wait"])

    run(test)


def test_clients_of_http_1_0_get_no_chunks():
    async def test() -> None:
        async with serving() as served:
            served.app.go_on.set()
            for lines in (b"", b"Connection: keep-alive\r\n"):
                answer = await served.ask(b"GET /stream HTTP/1.0\r\n" + lines + b"\r\n")
                header, _, body = answer.partition(b"\r\n\r\n")
                assert b"transfer-encoding" not in header
                assert b"connection: close" in header
                assert body == b"onetwothree"

    run(test)


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (b"x-request-id: abc-123\r\n", rb"abc-123"),
        (b"", rb"[0-9a-f]{32}"),
        (b"x-request-id: <script>\x01 a\r\n".replace(b"\x01", b"\t"), rb"scripta"),
        (b"x-request-id: " + b"a" * 5000 + b"\r\n", rb"a{128}"),
        (b"x-request-id: \xff\xfe\r\n", rb"[0-9a-f]{32}"),
    ],
)
def test_each_answer_names_its_request(given, shown):
    async def test() -> None:
        async with serving() as served:
            answer = await served.ask(b"GET /answer HTTP/1.1\r\nConnection: close\r\n" + given + b"\r\n")
            assert re.findall(rb"\r\nx-request-id: (.*?)\r\n", answer)
            assert re.search(rb"\r\nx-request-id: " + shown + rb"\r\n", answer)
            refusal = await served.ask(b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n" + given + b"\r\n")
            assert re.search(rb"\r\nx-request-id: [0-9a-f]{32}\r\n", refusal)

    run(test)


def test_a_body_that_nobody_asked_for_ends_the_connection():
    """A client that waits for "100 Continue" may send its body or not, once it has an answer."""

    async def test() -> None:
        async with serving() as served:
            head = b"POST %b HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
            assert b"connection: close" in await served.ask(head % b"/deaf")
            client = await served.connect(head % b"/answer")
            assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await client.send(b"abc")
            answer = await client.until(b"\r\n\r\n3")
            assert b"connection: close" not in answer

    run(test)


def test_an_upgrade_that_is_not_made_leaves_the_request_as_it_is():
    async def test() -> None:
        async with serving() as served:
            head = b"POST /answer HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\n"
            client = await served.connect(head + b"abc")
            assert status(await client.until(b"\r\n\r\n3")) == 200
            await client.send(GET)
            assert status(await client.until(b"\r\n\r\n0")) == 200

    run(test)


def test_what_is_no_http_behind_a_request_does_not_disturb_its_answer():
    async def test() -> None:
        async with serving() as served:
            served.app.go_on.set()
            answer = await served.ask(GET.replace(b"/answer", b"/stream") + b"\x16\x03\x01garbage\r\n\r\n")
            first, _, rest = answer.partition(b"three\r\n0\r\n\r\n")
            assert status(first) == 200
            assert status(rest) == 400

    run(test)


# --- bytes cut anywhere -----------------------------------------------------------------------------------------------


def conversation(draw: random.Random) -> tuple[bytes, list[int]]:
    """Pipelined requests, and the lengths that their answers name."""
    parts, lengths = [], []
    for _ in range(draw.randint(1, 12)):
        size = draw.choice([0, 1, 10, 1000, 40_000])
        body = bytes(draw.choices(b"ab\r\n0", k=size))
        kind = draw.choice(["get", "length", "chunks", "upgrade"])
        head = b"POST /answer HTTP/1.1\r\nHost: x\r\n"
        if kind == "get":
            parts.append(draw.choice([b"", b"\r\n"]) + GET)
            size = 0
        elif kind == "chunks":
            parts.append(head + b"Transfer-Encoding: chunked\r\n\r\n")
            while body:
                length = draw.randint(1, max(1, size // 3))
                chunk, body = body[:length], body[length:]
                parts.append(b"%x%b\r\n%b\r\n" % (len(chunk), draw.choice([b"", b";a=b"]), chunk))
            parts.append(b"0\r\n" + draw.choice([b"", b"trailer: x\r\n"]) + b"\r\n")
        else:
            more = b"Connection: Upgrade\r\nUpgrade: h2c\r\n" if kind == "upgrade" else b""
            parts.append(head + more + b"Content-Length: %d\r\n\r\n" % size + body)
        lengths.append(size)
    return b"".join(parts), lengths


def test_answers_do_not_depend_on_how_the_bytes_were_cut():
    async def test() -> None:
        async with serving() as served:
            for seed in range(60):
                draw = random.Random(seed)
                data, lengths = conversation(draw)
                client = await served.connect()
                connection = await until(lambda: next(iter(served.traffic.connections), None))
                at = 0
                while at < len(data):
                    size = draw.choice([1, 2, 3, 50, 5000, len(data)])
                    connection.data_received(data[at : at + size])
                    at += size
                    if draw.random() < 0.3:
                        await asyncio.sleep(0)
                answers = b""
                while len(found := re.findall(rb"HTTP/1.1 (\d+) .*?\r\n\r\n(\d*)", answers, re.S)) < len(lengths) or (
                    found[-1][1] != b"%d" % lengths[-1]
                ):
                    part = await client.read()
                    assert part, (seed, found, lengths)
                    answers += part
                assert [int(length) for _, length in found] == lengths, seed
                assert {code for code, _ in found} == {b"200"}
                client.sock.close()
                await until(lambda: not served.traffic.connections)
                assert served.traffic.bodies.held == 0
                assert not served.traffic.waiting

    run(test)
