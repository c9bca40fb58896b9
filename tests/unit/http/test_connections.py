"""What a connection may send before it is answered, and how long it may take."""

from __future__ import annotations

import asyncio

import pytest

from lightllmd.http import bounds as limits
from unit.http.http_scene import (
    CHUNKED,
    GET,
    run,
    serving,
    status,
    until,
)

# --- before the body --------------------------------------------------------------------------------------------------

LINES = b"".join(b"x-%d: y\r\n" % number for number in range(100_000))


@pytest.mark.parametrize(
    ("name", "data", "refusal"),
    [
        ("a long URL", b"GET /" + b"a" * 10_000_000 + b" HTTP/1.1\r\n\r\n", 414),
        ("a URL without end", b"GET /" + b"a" * 1_000_000, 414),
        ("a long line", b"GET /answer HTTP/1.1\r\nx: " + b"a" * 20_000 + b"\r\n\r\n", 431),
        ("a line without end", b"GET /answer HTTP/1.1\r\nx: " + b"a" * 10_000_000, 431),
        ("a name without end", b"GET /answer HTTP/1.1\r\n" + b"a" * 1_000_000, 431),
        ("many lines", b"GET /answer HTTP/1.1\r\n" + LINES + b"\r\n", 431),
        ("lines without end", b"GET /answer HTTP/1.1\r\n" + LINES, 431),
        ("few lines, much in all", b"GET /answer HTTP/1.1\r\n" + (b"x: " + b"y" * 9000 + b"\r\n") * 5, 431),
        ("empty lines without end", b"\r\n" * 1_000_000, 431),
    ],
)
def test_a_header_beyond_its_bounds_is_refused_before_anything_looks_at_it(name, data, refusal):
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            sending = asyncio.create_task(client.send(data))
            answer = await client.rest()
            assert status(answer) == refusal
            assert b"connection: close" in answer
            assert served.app.called == []
            client.sock.close()
            sending.cancel()

    run(test)


def test_headers_at_their_bounds_pass():
    async def test() -> None:
        async with serving() as served:
            lines = b"".join(b"x-%d: y\r\n" % number for number in range(limits.MAX_FIELDS - 2))
            url = b"/answer?" + b"a" * (limits.MAX_URL - 8)
            data = b"GET " + url + b" HTTP/1.1\r\nHost: x\r\n" + lines + b"Connection: close\r\n\r\n"
            assert status(await served.ask(data)) == 200

    run(test)


@pytest.mark.parametrize(
    "body",
    [
        b"1;" + b"e" * 1_000_000 + b"\r\na\r\n0\r\n\r\n",
        b"1;" + b"e" * 1_000_000,
        b"1;eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee\r\na\r\n" * 10_000 + b"0\r\n\r\n",
        b"1\r\na\r\n0\r\n" + LINES + b"\r\n",
        b"1\r\na\r\n0\r\nx: " + b"y" * 1_000_000,
    ],
)
def test_chunk_extensions_and_trailers_are_bounded(body):
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            sending = asyncio.create_task(client.send(CHUNKED + body))
            assert status(await client.rest()) == 413
            client.sock.close()
            sending.cancel()

    run(test)


def test_trailers_are_no_headers():
    """A middleware that looks at the headers of a request must not find there what came behind its body."""

    async def test() -> None:
        async with serving() as served:
            client = await served.connect(CHUNKED + b"1\r\na\r\n")
            connection = await until(lambda: next(iter(served.traffic.connections), None))
            headers = (await until(lambda: connection.answering)).scope["headers"]
            before = list(headers)
            await client.send(b"0\r\nauthorization: Bearer x\r\n\r\n")
            assert (await client.until(b"\r\n\r\n1")).startswith(b"HTTP/1.1 200")
            assert headers == before

    run(test)


def test_a_body_in_many_chunks_is_parsed_in_turns():
    async def test() -> None:
        async with serving() as served:
            body = b"1\r\na\r\n" * 40_000
            client = await served.connect(CHUNKED)
            connection = await until(lambda: next(iter(served.traffic.connections), None))
            exchange = await until(lambda: connection.answering)
            steps = []
            parse = connection.reader.turn

            def counted() -> bool:
                before = exchange.received
                again = parse()
                steps.append(exchange.received - before)
                return again

            connection.reader.turn = counted
            await client.send(body + b"0\r\n\r\n")
            assert (await client.until(b"\r\n\r\n40000")).startswith(b"HTTP/1.1 200")
            assert max(steps) <= 3 * (8 << 10) / 6

    run(test)


# --- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "drip"), [(b"G", b"E"), (b"GET / HTTP/1.1\r\nx: y\r\n", b"y: "), (b"\r\n", b"\r\n")])
def test_half_a_header_is_told_so_in_time_however_it_drips(data, drip):
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(data)
            await until(lambda: any(c._begun for c in served.traffic.connections))
            served.later(19)
            (connection,) = served.traffic.connections
            feed, fed = connection.reader.feed, []
            connection.reader.feed = lambda more: fed.append(more) or feed(more)
            await client.send(drip)
            await until(lambda: b"".join(fed) == drip)
            served.later(21)
            assert status(await client.rest()) == 408
            assert served.app.called == []

    run(test)


def test_a_silent_connection_is_closed_in_time():
    async def test() -> None:
        async with serving() as served:
            client = await served.connect()
            await until(lambda: served.traffic.connections)
            served.later(21)
            assert await client.rest() == b""

    run(test)


def test_an_idle_connection_is_kept_for_its_own_time():
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(GET)
            await client.until(b"\r\n\r\n0")
            served.later(74)
            await client.send(GET)
            await client.until(b"\r\n\r\n0")
            served.later(76)
            assert await client.rest() == b""

    run(test)


def test_one_byte_on_an_idle_connection_begins_a_header():
    """And so does not keep it for ever."""

    async def test() -> None:
        async with serving() as served:
            client = await served.connect(GET)
            await client.until(b"\r\n\r\n0")
            await client.send(b"G")
            await until(lambda: all(c._begun for c in served.traffic.connections))
            served.later(21)
            assert status(await client.rest()) == 408

    run(test)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_stops_or_drips_is_told_so_in_time(chunked):
    async def test() -> None:
        async with serving() as served:
            head = CHUNKED if chunked else b"POST /answer HTTP/1.1\r\nContent-Length: 100000\r\n\r\n"
            client = await served.connect(head + (b"7530\r\n" if chunked else b"") + b"a" * 30_000)
            connection = await until(lambda: next(iter(served.traffic.connections), None))
            await until(
                lambda: connection.reader.receiving is not None and connection.reader.receiving.received == 30_000
            )
            served.later(49)  # 20 s, and 1 s for each 1,000 bytes
            assert not connection._lingers
            served.later(51)
            assert status(await client.rest()) == 408
            await until(lambda: served.app.gone == ["/answer"])
            assert served.traffic.bodies.held == 0

    run(test)


@pytest.mark.parametrize("in_chunks", [False, True])
def test_the_rest_of_an_unwanted_body_is_thrown_away_for_a_while_only(in_chunks):
    async def test() -> None:
        async with serving() as served:
            chunked = CHUNKED.replace(b"/answer", b"/deaf")
            head = chunked if in_chunks else b"POST /deaf HTTP/1.1\r\nContent-Length: 100000000\r\n\r\n"
            client = await served.connect(head)
            await client.until(b"\r\n\r\n0")
            for _ in range(10):
                await client.send((b"100000\r\n%b\r\n" if in_chunks else b"%b") % bytes(1 << 20))
            assert served.traffic.bodies.held == 0
            served.later(29)
            assert len(served.traffic.connections) == 1
            served.later(31)
            served.later(34)
            assert await client.rest() == b""

    run(test)


def test_a_client_that_does_not_read_is_cut_off_with_little_kept_for_it():
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(b"GET /big HTTP/1.1\r\n\r\n", receive_buffer=4096)
            connection = await until(lambda: next(iter(served.traffic.connections), None))
            await until(lambda: connection.write_paused)
            assert connection.transport.get_write_buffer_size() < 1 << 20
            served.later(0)
            served.later(29)
            assert served.traffic.connections
            assert served.app.sent < 20 << 20
            served.later(31)
            await until(lambda: not served.traffic.connections)
            client.sock.close()

    run(test)


def test_a_client_that_reads_slowly_but_steadily_is_served():
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(b"GET /big HTTP/1.1\r\nConnection: close\r\n\r\n", receive_buffer=1 << 18)
            connection = await until(lambda: next(iter(served.traffic.connections), None))
            await until(lambda: connection.write_paused)
            got = 0
            for window in range(1, 4):
                served.later(31 * window)
                wanted = got + 500_000
                while got < wanted:
                    part = await client.read()
                    assert part
                    got += len(part)
            got += len(await client.rest())
            assert got > 20 << 20

    run(test)
