"""What becomes of connections and bodies where all connections, descriptors or memory are taken."""

from __future__ import annotations

import errno
import socket
from typing import Any

from lightllmd.http.connection import Connection
from lightllmd.http.server import Acceptor
from unit.http.http_scene import (
    GET,
    App,
    Served,
    post,
    run,
    serving,
    status,
    traffic_of,
    until,
)


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
            acceptor = Acceptor(exhausted, traffic, lambda: Connection(app, traffic, tasks, list), lambda: None)
            served = Served(app, traffic, listener.getsockname()[1])
            assert status(await (await served.connect(GET)).until(b"\r\n\r\n0")) == 200
            assert exhausted.failed
            assert traffic.bites["connections that wait: Too many open files"] == 1
            served.close()
            await until(lambda: not traffic.connections)
            acceptor.close()

    run(test)


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
