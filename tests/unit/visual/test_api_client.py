"""An api worker's images outlive visual workers: shown again from memory, released at the end of each request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from leftovers import no_new_descriptors
from lightllmd.api.images.client import VisualClient
from lightllmd.api.images.held import KeptImageBytes
from lightllmd.errors import InvalidRequest, NotReady, QueueFull, RequestError, RequestFailed
from lightllmd.requests.images import AskedImage
from lightllmd.visual.encoders import FakeEncoder
from lightllmd.visual.service import ImageService
from lightllmd.visual.store import ImageStore
from stub_viewer import StubViewer, key_of, lost


async def service_at(path: Path) -> ImageService:
    viewer: Any = StubViewer()
    encoder = FakeEncoder(2, 4)
    service = ImageService(ImageStore(8, 4), viewer, encoder, data_type="float32", batch=4, room_timeout=5)
    service.listen(str(path))
    return service


def client_of(path: Path, hold_timeout: float = 5, most: int = 1000) -> VisualClient:
    return VisualClient(str(path), hold_timeout, KeptImageBytes(most))


def test_images_are_shown_released_and_refused_by_field(tmp_path: Path) -> None:
    async def go() -> None:
        service, client = await service_at(tmp_path / "v"), client_of(tmp_path / "v")
        seen = await client.show([AskedImage("a", "data", "text"), AskedImage("b", "url", "http://x")])
        assert [fact.key for fact in seen.facts] == [key_of(b"text"), key_of(b"http://x")]
        assert service.store.references == 2
        with pytest.raises(InvalidRequest, match="images\\[1\\]: no image"):
            await client.show([AskedImage("images[0]", "url", "x"), AskedImage("images[1]", "url", "broken")])
        for _ in range(2):
            seen.release()
        assert client.held == 0
        while service.store.references:
            await asyncio.sleep(0.001)
        client.close()
        await service.close()

    with no_new_descriptors():
        asyncio.run(go())


def test_what_a_visual_worker_had_been_shown_is_shown_to_the_next_one(tmp_path: Path) -> None:
    async def go() -> None:
        first, client = await service_at(tmp_path / "v"), client_of(tmp_path / "v")
        kept = await client.show([AskedImage("a", "data", "one")])
        await first.close()
        held = asyncio.create_task(client.show([AskedImage("a", "data", "two")]))  # while none is there
        await asyncio.sleep(0)
        second = await service_at(tmp_path / "v")
        other = await held
        while second.store.references != 2:
            await asyncio.sleep(0.001)
        assert key_of(b"one") in second.store
        for seen in (kept, other):
            seen.release()
        while second.store.references:
            await asyncio.sleep(0.001)
        client.close()
        await lost(second, 0)
        await second.close()

    with no_new_descriptors():
        asyncio.run(go())


def test_a_request_is_held_no_longer_than_the_hold_timeout(tmp_path: Path) -> None:
    async def go() -> None:
        client = client_of(tmp_path / "v", 0.05)
        with pytest.raises(NotReady, match="visual worker"):
            await client.show([AskedImage("a", "data", "one")])
        assert client.held == 0
        client.close()

    with no_new_descriptors():
        asyncio.run(go())


def test_what_is_held_or_looked_at_goes_to_the_visual_worker_of_the_next_revision(tmp_path: Path) -> None:
    async def go() -> None:
        first, second = await service_at(tmp_path / "1"), await service_at(tmp_path / "2")
        before, after = client_of(tmp_path / "1"), client_of(tmp_path / "2")
        kept = await before.show([AskedImage("a", "data", "one")])
        looked_at = asyncio.create_task(before.show([AskedImage("a", "data", "two")]))
        while before.held != 2:
            await asyncio.sleep(0)
        before.migrate(after)
        later = await before.show([AskedImage("a", "data", "three")])  # asked of the old revision
        before.close()
        await lost(first, 0)
        assert first.store.references == 0
        seen = [kept, await looked_at, later]
        while second.store.references != 3:
            await asyncio.sleep(0.001)
        assert [one.facts[0].key for one in seen] == [key_of(b"one"), key_of(b"two"), key_of(b"three")]
        for one in seen:
            one.release()
        while second.store.references:
            await asyncio.sleep(0.001)
        after.close()
        await first.close()
        await second.close()

    with no_new_descriptors():
        asyncio.run(go())


def test_a_revision_that_is_forgotten_ends_its_connection_and_who_waits_for_it(tmp_path: Path) -> None:
    async def go() -> None:
        service, client = await service_at(tmp_path / "v"), client_of(tmp_path / "v")
        await client.show([AskedImage("a", "data", "one")])
        await service.close()
        waits = asyncio.create_task(client.show([AskedImage("a", "data", "two")]))
        while client.held != 2:
            await asyncio.sleep(0)
        client.close()
        with pytest.raises(NotReady, match="of this revision is gone"):
            await waits
        with pytest.raises(NotReady, match="of this revision is gone"):
            await client.show([AskedImage("a", "data", "three")])
        assert client.held == 0

    with no_new_descriptors():
        asyncio.run(go())


def test_who_has_images_hears_that_the_next_visual_worker_refuses_them(tmp_path: Path) -> None:
    async def go() -> None:
        first, client = await service_at(tmp_path / "v"), client_of(tmp_path / "v")
        images = [AskedImage("a", "data", "one")]
        told, late = await client.show(images), await client.show(images)
        heard: list[RequestError] = []
        told.when_lost(heard.append)
        await first.close()
        second = await service_at(tmp_path / "v")
        second.store.capacity = 0
        while not heard or late.lost is None:
            await asyncio.sleep(0.001)
        assert isinstance(heard[0], NotReady)
        assert "can't see this request's images any more: 1 images: at most 0" in heard[0].message
        late.when_lost(heard.append)  # that it was lost before is no secret
        assert len(heard) == 2
        for seen in (told, late):
            seen.release()
        client.close()
        await second.close()

    with no_new_descriptors():
        asyncio.run(go())


def test_no_more_bytes_are_kept_than_the_bound_says(tmp_path: Path) -> None:
    async def go() -> None:
        bound = KeptImageBytes(10)
        service, client = await service_at(tmp_path / "v"), VisualClient(str(tmp_path / "v"), 5, bound)
        kept = await client.show([AskedImage("a", "data", "123456")])
        assert bound.held == 6
        for kind in ("data", "url"):  # of the second the size is known when it has been fetched
            with pytest.raises(QueueFull, match=r"5 bytes; of images\.max_held_bytes = 10 other requests' take 6"):
                await client.show([AskedImage("a", kind, "12345")])
            with pytest.raises(InvalidRequest, match=r"11 bytes, more than images\.max_held_bytes = 10"):
                await client.show([AskedImage("a", kind, "12345678901")])
        assert (bound.held, client.held) == (6, 1)
        kept.release()
        assert bound.held == 0
        client.close()
        await service.close()

    with no_new_descriptors():
        asyncio.run(go())


def test_a_fault_of_the_visual_worker_s_own_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def faulty(viewer: StubViewer, sources: Any) -> Any:
        raise RuntimeError("a fault")

    async def go() -> None:
        service, client = await service_at(tmp_path / "v"), client_of(tmp_path / "v")
        with monkeypatch.context() as patched:
            patched.setattr(StubViewer, "view", faulty)
            with pytest.raises(RequestFailed, match="could not be processed"):
                await client.show([AskedImage("a", "data", "one")])
        (await client.show([AskedImage("a", "data", "one")])).release()
        client.close()
        await service.close()

    with no_new_descriptors():
        asyncio.run(go())
