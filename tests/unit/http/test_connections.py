"""What a connection may send, how long it may take, and how its end is told; over real sockets, with a clock that is
set forward rather than waited for."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lightllmd.http import bounds as limits
from lightllmd.http.bounds import Bounds
from lightllmd.http.connection import Connection
from lightllmd.http.server import Acceptor
from lightllmd.http.traffic import Traffic

PATIENCE = 20  # seconds; a bound, never a measure
GET = b"GET /answer HTTP/1.1\r\nHost: x\r\n\r\n"


class App:
    """/answer: 200 with the body's length. /stream: parts until `open`. /big: 20 MB. /wait: until the client is gone.
    /deaf: an answer that doesn't wait for the body."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.gone: list[str] = []
        self.go_on = asyncio.Event()
        self.sent = 0
        self.states: list[Any] = []

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        self.called.append(path)
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
        if path == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.append(path)
            return
        size, more = 0, path != "/deaf"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(path)
                return
            size, more = size + len(message["body"]), message["more_body"]
        if path == "/late":
            await self.go_on.wait()
        if path == "/stream":
            await send(start)
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await self.go_on.wait()
            await send({"type": "http.response.body", "body": b"two", "more_body": True})
            await send({"type": "http.response.body", "body": b"three", "more_body": False})
        elif path == "/big":
            await send(start)
            for _ in range(320):
                await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
                self.sent += 1 << 16
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            body = b"%d" % size
            start["headers"].append((b"content-length", b"%d" % len(body)))
            await send(start)
            await send({"type": "http.response.body", "body": body, "more_body": False})


class Served:
    def __init__(self, app: App, traffic: Traffic, port: int) -> None:
        self.app, self.traffic, self.port = app, traffic, port
        self._sockets: list[socket.socket] = []

    async def connect(self, data: bytes = b"", receive_buffer: int = 0) -> Client:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        self._sockets.append(sock)
        client = Client(sock)
        await client.send(data)
        return client

    async def ask(self, data: bytes) -> bytes:
        """All that is answered until the server closes."""
        return await (await self.connect(data)).rest()

    def later(self, seconds: float) -> None:
        """The server looks at its connections as if so much time had passed."""
        now = asyncio.get_running_loop().time() + seconds
        for connection in list(self.traffic.connections):
            connection.check(now)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self.sock, data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    async def read(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._loop.sock_recv(self.sock, 1 << 16)
            except ConnectionResetError:
                return b""

    async def rest(self) -> bytes:
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    async def until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            part = await self.read()
            assert part, data
            data += part
        return data


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (value := condition()):
            await asyncio.sleep(0.001)
        return value


BOUNDS = Bounds(
    header_timeout=20,
    body_timeout=20,
    write_timeout=30,
    keep_alive_timeout=75,
    min_rate=1000,
    connections=100,
    body_bytes=8 << 20,
    guests=2,
)


def traffic_of(bounds: dict[str, Any]) -> Traffic:
    values = {name: bounds.get(name, getattr(BOUNDS, name)) for name in BOUNDS.__dataclass_fields__}
    return Traffic(
        Bounds(**values),
        render=lambda error, path: json.dumps({"message": error.message, "path": path}).encode(),
        is_reserved=lambda path: path == "/health",
    )


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[Served]:
    app, traffic, tasks = App(), traffic_of(bounds), set()
    listener = socket.create_server(("127.0.0.1", 0))
    acceptor = Acceptor(listener, traffic, lambda: Connection(app, traffic, tasks, list), None)
    served = Served(app, traffic, listener.getsockname()[1])
    try:
        yield served
    finally:
        acceptor.close()
        listener.close()
        served.close()
        for connection in list(traffic.connections):
            connection.transport.abort()
        await until(lambda: not traffic.connections and not tasks)


def run(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


# --- before the body -------------------------------------------------------------------------------------------------

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


CHUNKED = b"POST /answer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


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


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "drip"), [(b"G", b"E"), (b"GET / HTTP/1.1\r\nx: y\r\n", b"y: "), (b"\r\n", b"\r\n")])
def test_half_a_header_is_told_so_in_time_however_it_drips(data, drip):
    async def test() -> None:
        async with serving() as served:
            client = await served.connect(data)
            await until(lambda: any(c._begun for c in served.traffic.connections))
            served.later(19)
            assert len(served.traffic.connections) == 1
            await client.send(drip)
            await asyncio.sleep(0.01)
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


# --- number ----------------------------------------------------------------------------------------------------------


def test_where_all_connections_are_taken_the_longest_silent_gives_way():
    async def test() -> None:
        async with serving(connections=4) as served:
            silent = []
            for number in range(4):
                silent.append(await served.connect(b"GE"))
                await until(lambda count=number + 1: len(served.traffic.connections) == count)
            answer = await (await served.connect(GET)).until(b"\r\n\r\n0")
            assert status(answer) == 200
            assert await silent[0].rest() == b""
            await silent[3].send(GET[2:])
            assert status(await silent[3].until(b"\r\n\r\n0")) == 200
            assert served.traffic.stats()["connections_full"] == 1

    run(test)


def test_where_all_connections_are_busy_health_still_answers_and_others_are_told():
    async def test() -> None:
        async with serving(connections=4) as served:
            busy = [await served.connect(GET.replace(b"/answer", b"/stream")) for _ in range(4)]
            for client in busy:
                await client.until(b"one\r\n")
            refusal = await served.ask(GET)
            assert status(refusal) == 503
            assert b"retry-after: 1" in refusal
            assert b"all 4 connections are in use" in refusal
            health = await served.ask(GET.replace(b"/answer", b"/health"))
            assert status(health) == 200
            idle = [await served.connect() for _ in range(20)]
            assert status(await served.ask(GET.replace(b"/answer", b"/health"))) == 200
            served.app.go_on.set()
            for client in busy:
                await client.until(b"three\r\n0\r\n\r\n")
            assert len(idle) == 20

    run(test)


def test_without_a_descriptor_accepting_pauses_and_goes_on():
    class Exhausted:
        """A listener whose host has none left, once."""

        def __init__(self, sock: socket.socket) -> None:
            self._sock, self.failed = sock, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sock, name)

        def accept(self) -> Any:
            if not self.failed:
                self.failed += 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self._sock.accept()

    async def test() -> None:
        app, traffic, tasks = App(), traffic_of({}), set()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            exhausted = Exhausted(listener)
            acceptor = Acceptor(exhausted, traffic, lambda: Connection(app, traffic, tasks, list), None)
            served = Served(app, traffic, listener.getsockname()[1])
            assert status(await (await served.connect(GET)).until(b"\r\n\r\n0")) == 200
            assert exhausted.failed
            assert traffic.bites["connections that wait: Too many open files"] == 1
            served.close()
            await until(lambda: not traffic.connections)
            acceptor.close()

    run(test)


def post(size: int, path: bytes = b"/answer") -> bytes:
    return b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (path, size)


def test_memory_for_bodies_is_bounded_and_small_ones_always_find_room():
    async def test() -> None:
        async with serving(body_bytes=1 << 20) as served:
            held = await served.connect(post(900_000) + bytes(800_000))
            await until(lambda: served.traffic.bodies.held >= 800_000)
            refusal = await served.ask(post(900_000) + bytes(300_000))
            assert status(refusal) == 503
            assert b"1048576 bytes" in refusal
            assert (await (await served.connect(post(1000) + bytes(1000))).until(b"\r\n\r\n1000"))[9:12] == b"200"
            await held.send(bytes(100_000))
            assert status(await held.until(b"\r\n\r\n900000")) == 200
            await until(lambda: served.traffic.bodies.held == 0)

    run(test)


def test_a_slow_body_gives_way_to_others():
    async def test() -> None:
        async with serving(body_bytes=1 << 20) as served:
            slow = await served.connect(post(900_000) + bytes(800_000))
            await until(lambda: served.traffic.bodies.held >= 800_000)
            connection = next(iter(served.traffic.connections))
            connection.reader.receiving.begun -= 10
            quick = await served.connect(post(500_000) + bytes(500_000))
            assert status(await quick.until(b"\r\n\r\n500000")) == 200
            assert status(await slow.rest()) == 408

    run(test)


# --- how a request and its answer end ---------------------------------------------------------------------------------


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


# --- bytes cut anywhere ----------------------------------------------------------------------------------------------


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
