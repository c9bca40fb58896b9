"""A request's images come out together, told apart by what is seen on them, or none of them does."""

from __future__ import annotations

import asyncio
import base64
import threading
from typing import Any

import psutil
import pytest
from PIL import Image

from hostile_images import RED, SVG, quarters, saved
from image_servers import Names, Source, ok, serving
from leftovers import no_new_descriptors
from lightllmd.visual.decode import ImageDecoder
from lightllmd.visual.fetch import Fetcher
from lightllmd.visual.image_file import ImageFile, ImageRefused
from lightllmd.visual.limits import DecodeLimits, FetchLimits
from lightllmd.visual.picture import Picture
from lightllmd.visual.viewing import Viewed, Viewer, content_key

SECRET = b"secret"


def prepared(picture: Picture) -> Any:
    assert threading.current_thread() is not threading.main_thread()
    return picture.image().getpixel((0, 0))


async def viewing(sources: list[tuple[Source, int]], **options: Any) -> list[Viewed]:
    fetcher = Fetcher(FetchLimits(allowed_networks=("127.0.0.1/32",)), Names())
    decoder = ImageDecoder(DecodeLimits())
    try:
        viewed = await Viewer(fetcher, decoder, prepared, SECRET, **options).view(sources)
        assert fetcher.held.held == sum(one.file.size for one in viewed if one.file.held)
        return viewed
    finally:
        await decoder.close()


def close(viewed: list[Viewed]) -> None:
    for one in viewed:
        one.file.close()


def test_the_same_picture_has_one_key_wherever_it_comes_from() -> None:
    same, other = (
        [saved(quarters(), kind) for kind in ("PNG", "BMP", "TIFF")],
        saved(Image.new("RGB", (64, 48), RED), "PNG"),
    )

    async def go() -> list[Viewed]:
        with (
            ImageFile.of(base64.b64encode(same[1])) as text,
            ImageFile.of(same[2]) as body,
            ImageFile.of(other) as last,
        ):
            async with serving(ok(same[0])) as server:
                return await viewing(
                    [
                        (Source(url=server.url()), -1),
                        (Source("data"), text.fd),
                        (Source("bytes"), body.fd),
                        (Source("bytes"), last.fd),
                    ]
                )

    with no_new_descriptors():
        viewed = asyncio.run(go())
        assert [one.file.read() for one in viewed] == [*same, other]
        assert len({one.key for one in viewed[:3]}) == 1
        assert viewed[3].key != viewed[0].key
        assert {(one.width, one.height, one.prepared) for one in viewed} == {(64, 48, RED)}
        close(viewed)


def test_keys_know_the_sides_and_the_secret() -> None:
    keys = set()
    for width, height, secret in ((8, 2, SECRET), (2, 8, SECRET), (4, 4, SECRET), (4, 4, b"another")):
        with ImageFile.of(bytes(48)) as file, no_new_descriptors():
            picture = Picture(file.fd, width, height)
            keys.add(content_key(picture, secret))
            picture.fd = -1
    assert len(keys) == 4


def test_nothing_is_prepared_of_a_picture_that_is_known() -> None:
    async def go() -> list[Viewed]:
        with ImageFile.of(saved(quarters(), "PNG")) as body:
            return await viewing([(Source("bytes"), body.fd)], known=lambda _: True)

    with no_new_descriptors():
        viewed = asyncio.run(go())
        assert viewed[0].prepared is None
        close(viewed)


def test_one_bad_image_refuses_the_request_by_its_index_and_nothing_is_left() -> None:
    async def go() -> None:
        before = psutil.Process().memory_info().rss
        with ImageFile.of(saved(quarters(), "PNG")) as good, ImageFile.of(SVG) as bad:
            for at in (0, 7):
                sources = [(Source("bytes"), bad.fd if index == at else good.fd) for index in range(12)]
                with pytest.raises(ImageRefused, match=r"a drawing \(SVG\)") as refused:
                    await viewing(sources)
                assert refused.value.parameters["index"] == at
            with pytest.raises(ImageRefused) as refused:
                await viewing([(Source("bytes"), good.fd), (Source(url="http://[::1]/"), -1)])
            assert refused.value.parameters["index"] == 1
        assert psutil.Process().memory_info().rss - before < 64 << 20

    with no_new_descriptors():
        asyncio.run(go())
