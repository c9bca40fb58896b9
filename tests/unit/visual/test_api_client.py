"""An api worker's images outlive visual workers: shown again from memory, released at the end of each request."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from leftovers import no_new_descriptors
from lightllmd.api.images.client import VisualClient
from lightllmd.errors import InvalidRequest, NotReady
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


def test_images_are_shown_released_and_refused_by_field(tmp_path: Path) -> None:
    async def go() -> None:
        service, client = await service_at(tmp_path / "v"), VisualClient(str(tmp_path / "v"), 5)
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
        first, client = await service_at(tmp_path / "v"), VisualClient(str(tmp_path / "v"), 5)
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
        client = VisualClient(str(tmp_path / "v"), 0.05)
        with pytest.raises(NotReady, match="visual worker"):
            await client.show([AskedImage("a", "data", "one")])
        assert client.held == 0
        client.close()

    with no_new_descriptors():
        asyncio.run(go())
