"""The visual worker's service in this process: what clients show and want, and what is left when they are gone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Sequence
from typing import Any

from leftovers import no_new_descriptors
from lightllmd.ipc.images import (
    FromVisual,
    ImageSource,
    ImageStream,
    NotSeen,
    Seen,
    Show,
    Unknown,
    Unshow,
    Want,
    Wanted,
    to_visual,
)
from lightllmd.visual.encoders import FakeEncoder
from lightllmd.visual.service import ImageService
from lightllmd.visual.store import ImageStore
from stub_viewer import StubViewer, key_of, lost


class EnginePeer:
    """One connection to the service, and all that came back on it."""

    def __init__(self, service: ImageService) -> None:
        ours, theirs = socket.socketpair()
        service.connect(theirs)
        self.stream: ImageStream[FromVisual] = to_visual(ours)
        self.arrived: asyncio.Queue[tuple[FromVisual, list[bytes]]] = asyncio.Queue()
        asyncio.get_running_loop().add_reader(ours, self._read)

    def _read(self) -> None:
        for message, descriptors in self.stream.receive():
            self.arrived.put_nowait((message, [os.pread(fd, 100, 0) for fd in descriptors]))
            for fd in descriptors:
                os.close(fd)

    def show(self, request: int, *urls: str) -> None:
        assert self.stream.send(Show(request, [ImageSource("url", url) for url in urls]))

    async def next(self) -> tuple[FromVisual, list[bytes]]:
        return await asyncio.wait_for(self.arrived.get(), 30)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.stream.fileno())
        self.stream.close()


@contextlib.asynccontextmanager
async def serving(capacity: int = 8, *, room_timeout: float = 30.0, encoder: Any = None) -> AsyncIterator[ImageService]:
    store = ImageStore(capacity, capacity // 2)
    encoder = encoder or FakeEncoder(2, 4)
    viewer: Any = StubViewer()
    service = ImageService(store, viewer, encoder, data_type="float32", batch=4, room_timeout=room_timeout)
    encoding = asyncio.create_task(service.encode_for_ever())
    try:
        yield service
    finally:
        encoding.cancel()
        await asyncio.gather(encoding, return_exceptions=True)
        await service.close()


async def settled(service: ImageService) -> None:
    while any(client.shows for client in service.clients) or service.store.queued:
        await asyncio.sleep(0.001)


def test_an_image_is_shown_encoded_and_given_to_the_engine() -> None:
    async def go() -> None:
        async with serving() as service:
            api, engine = EnginePeer(service), EnginePeer(service)
            api.show(1, "a", "b", "a")
            seen, files = await api.next()
            assert isinstance(seen, Seen)
            assert [fact.key for fact in seen.facts] == [key_of(b"a"), key_of(b"b"), key_of(b"a")]
            assert [fact.tokens for fact in seen.facts] == [2, 2, 2]
            assert files == [b"a", b"b", b"a"]
            engine.stream.send(Want(key_of(b"a")))
            wanted, values = await engine.next()
            assert wanted == Wanted(key_of(b"a"), (1, 2, 4), "float32")
            assert len(values[0]) == 2 * 4 * 4
            engine.stream.send(Want(key_of(b"c")))
            assert (await engine.next())[0] == Unknown(key_of(b"c"))
            await settled(service)
            assert service.counts.encoded == 2
            for end in (api, engine):
                end.close()
            await lost(service, 0)
            assert service.store.references == 0

    with no_new_descriptors():
        asyncio.run(go())


def test_a_hundred_requests_of_twenty_images_are_twenty_encodings() -> None:
    async def go() -> None:
        async with serving(40) as service:
            api = EnginePeer(service)
            for request in range(100):
                api.show(request, f"picture {request % 20}")
            for _ in range(100):
                assert isinstance((await api.next())[0], Seen)
            await settled(service)
            assert service.counts.encoded == 20
            api.close()

    asyncio.run(go())


def test_requests_that_want_more_together_than_there_is_room_for_are_all_served() -> None:
    async def go() -> None:
        async with serving(4) as service:
            api = EnginePeer(service)
            for request in range(12):  # each pair of them would deadlock if each took what it could get
                api.show(request, *(f"{request} {number}" for number in range(3)))
            for _ in range(12):
                seen, _ = await api.next()
                assert isinstance(seen, Seen)
                assert len(service.store) <= 4
                api.stream.send(Unshow(seen.request))
            api.close()

    asyncio.run(go())


def test_what_cannot_be_seen_is_refused_and_keeps_nothing() -> None:
    async def go() -> None:
        async with serving(2, room_timeout=0.05) as service:
            api = EnginePeer(service)
            api.show(1, "a", "broken")
            assert (await api.next())[0] == NotSeen(1, 400, "no image", 1)
            api.show(2, "a", "b", "c")
            refused, _ = await api.next()
            assert isinstance(refused, NotSeen)
            assert refused.status == 400
            assert "cache_capacity" in refused.message
            assert service.store.references == 0
            api.show(3, "a", "b")
            assert isinstance((await api.next())[0], Seen)
            api.show(4, "c")
            refused, _ = await api.next()
            assert isinstance(refused, NotSeen)
            assert refused.status == 503
            api.close()

    asyncio.run(go())


def test_an_image_that_cannot_be_encoded_takes_no_other_with_it() -> None:
    class Picky(FakeEncoder):
        def encode(self, prepared: Sequence[bytes]) -> Any:
            if b"bad" in prepared:
                raise RuntimeError("bad picture")
            return super().encode(prepared)

    async def go() -> None:
        async with serving(encoder=Picky(2, 4)) as service:
            api = EnginePeer(service)
            api.show(1, "a", "bad", "b")
            await api.next()
            for content, type_ in ((b"a", Wanted), (b"bad", Unknown), (b"b", Wanted)):
                api.stream.send(Want(key_of(content)))
                answer, _ = await api.next()
                assert isinstance(answer, type_)
                assert answer.key == key_of(content)
            api.close()

    asyncio.run(go())


def test_clients_that_come_show_abort_and_die_at_random_leave_nothing() -> None:
    async def go() -> None:
        chance = random.Random(17)
        async with serving(6) as service:
            peers = [EnginePeer(service) for _ in range(3)]
            for turn in range(2000):
                peer = chance.choice(peers)
                what = chance.random()
                if what < 0.5:
                    names = [f"{chance.randrange(20)}" for _ in range(chance.randint(1, 6))]
                    peer.show(turn, *names, *(["broken"] if chance.random() < 0.1 else []))
                elif what < 0.85:
                    peer.stream.send(Unshow(chance.randrange(max(0, turn - 20), turn + 1)))
                elif what < 0.97:
                    peer.stream.send(Want(key_of(b"%d" % chance.randrange(20))))
                else:
                    peers.remove(peer)
                    peer.close()
                    peers.append(EnginePeer(service))
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
                assert len(service.store) <= 6
            for peer in peers:
                peer.close()
            await lost(service, 0)
            assert service.store.references == 0
            while service.store.queued:
                await asyncio.sleep(0.001)

    with no_new_descriptors():
        asyncio.run(go())
