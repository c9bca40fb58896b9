"""The api worker's client of the visual worker, beside a stand-in that speaks its protocol on a real socket."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from api.frontend_harness import run, until
from lightllmd.api.images.client import VisualClient
from lightllmd.errors import InvalidRequest, NotReady, QueueFull
from lightllmd.ipc.images import ImageFacts, ImageStream, NotSeen, Seen, Show, ToVisual, Unshow, of_client
from lightllmd.requests.images import AskedImage

PATIENCE = 30.0


def images(*contents: str) -> list[AskedImage]:
    return [
        AskedImage(f"images.{at}", "data" if one.startswith("data:") else "url", one) for at, one in enumerate(contents)
    ]


class StandIn:
    """A visual worker that keeps what it hears; `answers` says what it makes of a request."""

    def __init__(self, path: Path) -> None:
        self.path, self.answers = path, True
        self.refusal: NotSeen | None = None
        self.heard: list[ToVisual] = []
        self.contents: list[list[bytes]] = []  # of the memfds of each Show
        self._links: list[ImageStream[ToVisual]] = []
        self._server: asyncio.Server | None = None

    async def start(self) -> StandIn:
        import socket

        self.path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(str(self.path))
        listener.listen()
        listener.setblocking(False)
        self._listener = listener
        self._task = asyncio.create_task(self._accept())
        return self

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            sock, _ = await loop.sock_accept(self._listener)
            link = of_client(sock)
            self._links.append(link)
            loop.add_reader(link.fileno(), self._read, link)

    def _read(self, link: ImageStream[ToVisual]) -> None:
        for message, files in link.receive():
            self.heard.append(message)
            if isinstance(message, Show):
                self.contents.append([os.pread(file, 1 << 20, 0) for file in files])
                if self.answers:
                    self.answer(link, message)
            for file in files:
                os.close(file)
        if link.closed:
            asyncio.get_running_loop().remove_reader(link.fileno())
            link.close()

    def answer(self, link: ImageStream[ToVisual], show: Show) -> None:
        if self.refusal is not None:
            refusal = self.refusal
            link.send(NotSeen(show.request, refusal.status, refusal.message, refusal.index))
            return
        files = []
        for number, _ in enumerate(show.images):
            files.append(os.memfd_create("test"))
            os.write(files[-1], b"file %d" % number)
        facts = [ImageFacts(bytes([at]) * 16, 4, 4, 7 + at, (1, 0, 0)) for at in range(len(files))]
        link.send(Seen(show.request, facts), files)
        for file in files:
            os.close(file)

    def die(self) -> None:
        self._task.cancel()
        self._listener.close()
        for link in self._links:
            if not link.closed:
                asyncio.get_running_loop().remove_reader(link.fileno())
                link.close()
        self.path.unlink(missing_ok=True)

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.heard if isinstance(message, kind)]


@asynccontextmanager
async def connected(folder: Path, patience: float = PATIENCE) -> AsyncIterator[tuple[VisualClient, StandIn]]:
    before = len(os.listdir("/proc/self/fd"))
    worker, client = await StandIn(folder / "visual").start(), VisualClient(patience)
    client.at(str(folder / "visual"))
    try:
        yield client, worker
    finally:
        client.close()
        worker.die()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_images_are_seen_until_they_are_released(tmp_path: Path) -> None:
    async def go() -> None:
        async with connected(tmp_path) as (client, worker):
            seen = await client.show(images("http://x/1", "data:,abc"))
            assert [(fact.key, fact.tokens) for fact in seen.facts] == [(b"\0" * 16, 7), (b"\1" * 16, 8)]
            (show,) = worker.of(Show)
            assert [(one.kind, one.url) for one in show.images] == [("url", "http://x/1"), ("data", "")]
            assert worker.contents == [[b"data:,abc"]]
            seen.release()
            seen.release()
            await until(lambda: worker.of(Unshow))
            assert worker.of(Unshow) == [Unshow(show.request)]

    run(go())


@pytest.mark.parametrize(
    ("refusal", "kind", "words"),
    [
        (NotSeen(0, 400, "is no image", 1), InvalidRequest, "images.1: is no image"),
        (NotSeen(0, 400, "too many images"), InvalidRequest, "too many images"),
        (NotSeen(0, 429, "busy"), QueueFull, "busy"),
        (NotSeen(0, 503, "no room", 0), NotReady, "images.0: no room"),
    ],
)
def test_what_is_not_seen_is_refused_as_the_worker_says(
    refusal: NotSeen, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    async def go() -> None:
        async with connected(tmp_path) as (client, worker):
            worker.refusal = refusal
            with pytest.raises(kind) as refused:
                await client.show(images("http://x/1", "http://x/2"))
            assert refused.value.message == words  # type: ignore[attr-defined]

    run(go())


def test_a_visual_worker_that_is_started_again_is_shown_the_files_that_are_held(tmp_path: Path) -> None:
    async def go() -> None:
        async with connected(tmp_path) as (client, worker):
            held = await client.show(images("http://x/1", "http://x/2"))
            (await client.show(images("http://x/3"))).release()
            worker.die()
            again = await StandIn(worker.path).start()
            await until(lambda: again.of(Show))
            (show,) = again.of(Show)
            assert [one.kind for one in show.images] == ["bytes", "bytes"]
            assert again.contents == [[b"file 0", b"file 1"]]
            held.release()
            await until(lambda: again.of(Unshow))
            again.die()

    run(go())


def test_a_request_waits_for_a_visual_worker_that_is_not_there_yet_and_not_for_ever(tmp_path: Path) -> None:
    async def go() -> None:
        client = VisualClient(0.2)
        client.at(str(tmp_path / "none"))
        with pytest.raises(NotReady, match=r"did not see the request's images within 0\.2 s"):
            await client.show(images("http://x/1"))
        patient = VisualClient(PATIENCE)
        asking = asyncio.create_task(patient.show(images("http://x/1")))
        worker = await StandIn(tmp_path / "late").start()
        patient.at(str(worker.path))
        assert (await asking).facts
        client.close()
        patient.close()
        worker.die()

    run(go())


def test_a_request_that_is_given_up_is_unshown(tmp_path: Path) -> None:
    async def go() -> None:
        async with connected(tmp_path) as (client, worker):
            worker.answers = False
            asking = asyncio.create_task(client.show(images("http://x/1")))
            await until(lambda: worker.of(Show))
            asking.cancel()
            await until(lambda: worker.of(Unshow))

    run(go())


def test_what_is_held_goes_to_the_visual_worker_of_the_next_revision(tmp_path: Path) -> None:
    async def go() -> None:
        async with connected(tmp_path) as (client, _):
            held = await client.show(images("http://x/1"))
            other, successor = await StandIn(tmp_path / "other").start(), VisualClient(PATIENCE)
            successor.at(str(other.path))
            client.migrate(successor)
            await until(lambda: other.of(Show))
            assert other.contents == [[b"file 0"]]
            (await client.show(images("http://x/2"))).release()
            assert len(other.of(Show)) == 2
            held.release()
            await until(lambda: len(other.of(Unshow)) == 2)
            successor.close()
            other.die()

    run(go())
