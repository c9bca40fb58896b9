"""The load generator: sends planned requests to an HTTP server and records when each token came.

Closed loop (so many requests at a time) or open loop (each request at its planned moment, however many are still
running). ``python -m lightllmctl.load`` is one of several processes that share a load: the share comes in on stdin as
MessagePack, a byte goes out when it is ready, the moment to begin comes in, and the records go out.
"""

from __future__ import annotations

import asyncio
import resource
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import cast

import msgspec
import uvloop

from lightllmctl.answer import MalformedAnswer, Record, StreamAnswer
from lightllmd.errors import CTL_INTERRUPTED, SystemFailure

READY = b"R"
LEAD = 0.1  # seconds between the word to begin and the beginning, so that all processes have heard it


class Planned(msgspec.Struct):
    """One request to be made."""

    body: bytes  # JSON
    asked: int  # new tokens
    due: float = 0.0  # seconds from the beginning; open loop only


class Share(msgspec.Struct):
    """What one process has to do."""

    host: str
    port: int
    tls: bool
    path: str
    headers: dict[str, str]
    planned: list[Planned]  # in order of `due`
    concurrency: int  # requests at a time; 0: open loop
    timeout: float  # seconds for each request

    def message(self, body: bytes) -> bytes:
        """The whole HTTP/1.1 request with this body."""
        lines = [f"POST {self.path} HTTP/1.1", f"Host: {self.host}:{self.port}", "Content-Type: application/json"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class LoadConnection(asyncio.Protocol):
    """Carries one request at a time."""

    def __init__(self) -> None:
        self.used = False  # by an earlier request
        self._transport: asyncio.Transport
        self._answer: StreamAnswer | None = None
        self._done: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's call: it is open."""
        self._transport = cast(asyncio.Transport, transport)  # of uvloop, which has classes of its own

    def data_received(self, data: bytes) -> None:
        """asyncio's call: bytes of the answer; what no request asked for ends the connection."""
        if self._answer is None:
            self._transport.abort()
            return
        now = time.monotonic()
        try:
            if not self._answer.feed(data, now):
                return
        except MalformedAnswer as bad:
            self._answer.record.failure, self._answer.record.detail = "bad answer", str(bad)
            self._answer.record.end = now
            self._answer.reusable = False
        self._end()

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's call: it is closed, and the answer with it."""
        if self._answer is not None:
            self._answer.closed(time.monotonic())
            self._answer.reusable = False
            self._end()

    def _end(self) -> None:
        self._answer = None
        if not self._done.done():
            self._done.set_result(None)

    async def exchange(self, message: bytes, answer: StreamAnswer) -> None:
        """Sends a request and waits until `answer` is complete, or has failed."""
        self._answer, self._done = answer, asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            await self._done
        finally:
            self._answer = None

    @property
    def usable(self) -> bool:
        """Whether it may carry a request."""
        return not self._transport.is_closing()

    def close(self) -> None:
        """Closes it at once."""
        self._transport.abort()


class LoadGenerator:
    """Runs one share."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self._tls = ssl.create_default_context() if share.tls else None
        self._idle: list[LoadConnection] = []

    async def run(self, begin: float) -> list[Record]:
        """The records in the order of the plan. `begin`: seconds of the monotonic clock."""
        share = self._share
        records = [Record(planned.asked, begin + planned.due) for planned in share.planned]
        line = iter(zip(share.planned, records, strict=True))
        await asyncio.sleep(begin - time.monotonic())
        if share.concurrency:
            lanes = [self._lane(line) for _ in range(min(share.concurrency, len(records)))]
        else:
            lanes = [self._at_its_time(planned, record) for planned, record in line]
        await asyncio.gather(*lanes)
        for connection in self._idle:
            connection.close()
        return records

    async def _lane(self, line: Iterator[tuple[Planned, Record]]) -> None:
        for planned, record in line:
            record.start = time.monotonic()
            await self._make(planned, record)

    async def _at_its_time(self, planned: Planned, record: Record) -> None:
        """The start stays the planned one, so that a client that falls behind doesn't flatter the server."""
        await asyncio.sleep(record.start - time.monotonic())
        await self._make(planned, record)

    async def _make(self, planned: Planned, record: Record) -> None:
        try:
            async with asyncio.timeout(self._share.timeout):
                await self._exchange(planned, record)
        except TimeoutError:
            record.failure, record.detail = "timeout", f"after {len(record.times)} events"
        except OSError as error:
            record.failure, record.detail = "connect", str(error)
        record.end = record.end or time.monotonic()

    async def _exchange(self, planned: Planned, record: Record) -> None:
        """On a kept connection if there is one, and once more on a new one if the server had closed that by then."""
        message = self._share.message(planned.body)
        while True:
            connection = self._kept() or await self._open()
            again, connection.used = connection.used, True
            answer = StreamAnswer(record)
            try:
                await connection.exchange(message, answer)
            finally:
                if answer.reusable and record.end:
                    self._idle.append(connection)
                else:
                    connection.close()
            if not (again and answer.untouched):
                return
            record.failure = record.detail = ""
            record.end = 0.0

    def _kept(self) -> LoadConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        return None

    async def _open(self) -> LoadConnection:
        share = self._share
        _, connection = await asyncio.get_running_loop().create_connection(
            LoadConnection, share.host, share.port, ssl=self._tls
        )
        return connection


def run_share(share: Share, begin: float) -> list[Record]:
    """Runs a share in this process from `begin` on (monotonic seconds). One record per request."""
    _allow_files(len(share.planned))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(LoadGenerator(share).run(begin))


def _allow_files(connections: int) -> None:
    """Raises the soft limit on open files as far as the hard one lets it; the usual 1024 are soon used up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


# --- several processes ------------------------------------------------------------------------------------------------


class LoadProcess:
    """Another process with a part of the load."""

    def __init__(self, share: Share) -> None:
        command = [sys.executable, "-m", "lightllmctl.load"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        body = msgspec.msgpack.encode(share)
        self._in.write(struct.pack("Q", len(body)) + body)
        self._in.flush()

    def wait_ready(self) -> None:
        """Raises SystemFailure."""
        if self._out.read(len(READY)) != READY:
            raise SystemFailure(f"a load generator ended at its start with {self._process.wait()}")

    def begin(self, moment: float) -> None:
        """The load begins at `moment` (monotonic seconds, which all processes of a host share)."""
        self._in.write(struct.pack("d", moment))
        self._in.flush()

    def records(self) -> list[Record]:
        """Waits for them. Raises SystemFailure."""
        body = self._out.read()
        if code := self._process.wait():
            raise SystemFailure(f"a load generator ended with {code}")
        return msgspec.msgpack.decode(body, type=list[Record])

    def end(self) -> None:
        """Kills it, if it still runs, and waits for it."""
        self._process.kill()
        with self._process:  # closes the pipes, waits
            pass


def generate(share: Share, processes: int = 1) -> list[Record]:
    """Runs the whole load in `processes` processes (1: this one) that begin together. Raises SystemFailure."""
    processes = max(1, min(processes, share.concurrency or len(share.planned), len(share.planned)))
    if processes == 1:
        return run_share(share, time.monotonic())
    children: list[LoadProcess] = []
    try:
        for part in split(share, processes):
            children.append(LoadProcess(part))
        for child in children:
            child.wait_ready()
        moment = time.monotonic() + LEAD
        for child in children:
            child.begin(moment)
        return [record for child in children for record in child.records()]
    finally:
        for child in children:
            child.end()


def split(share: Share, processes: int) -> Iterator[Share]:
    """Deals requests and concurrency out like cards."""
    for number in range(processes):
        concurrency = len(range(number, share.concurrency, processes))
        yield msgspec.structs.replace(share, planned=share.planned[number::processes], concurrency=concurrency)


def main() -> None:
    """The other end of `LoadProcess`: a share on stdin, its records on stdout."""
    # Buffered whatever PYTHONUNBUFFERED says: without a buffer a long write to a pipe may end in the middle.
    stdin, stdout = sys.stdin.buffer, open(sys.stdout.fileno(), "wb", closefd=False)  # noqa: SIM115
    (length,) = struct.unpack("Q", stdin.read(8))
    share = msgspec.msgpack.decode(stdin.read(length), type=Share)
    stdout.write(READY)
    stdout.flush()
    (begin,) = struct.unpack("d", stdin.read(8))
    stdout.write(msgspec.msgpack.encode(run_share(share, begin)))
    stdout.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(CTL_INTERRUPTED)
