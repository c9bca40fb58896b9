"""Images that a request holds itself are base64 as it should be, or are refused by what is wrong with them."""

from __future__ import annotations

import asyncio
import base64
import os

import pytest

from image_servers import Source
from leftovers import no_new_descriptors
from lightllmd.visual import encoded
from lightllmd.visual.fetch import Fetcher
from lightllmd.visual.image_file import ImageFile, ImageRefused
from lightllmd.visual.limits import FetchLimits

BODY = os.urandom(200_001)
TEXT = base64.b64encode(BODY)
MOST = len(BODY)


def decoded(text: bytes, most: int = MOST) -> bytes:
    with no_new_descriptors(), ImageFile.of(text) as given, encoded.decode(given.fd, given.size, most) as file:
        return file.read()


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        b"data:image/png;base64," + TEXT,
        b"DATA:IMAGE/PNG;charset=utf-8;BASE64," + TEXT,
        b"data:;base64," + TEXT,
        b"data:text/html;base64, " + TEXT,
        b"image/jpeg;base64," + TEXT,  # what clients write after reading APIs that want it without "data:"
        base64.encodebytes(BODY),
        TEXT.replace(b"A", b"A\r\n"),
        b"\n data:image/png;base64,\n" + TEXT + b"\n",
    ],
    ids=["bare", "uri", "capitals", "no type", "another type", "no data:", "mail", "breaks", "around"],
)
def test_base64_is_taken_bare_and_as_a_data_uri(text: bytes) -> None:
    assert decoded(text) == BODY


@pytest.mark.parametrize("cut", range(1, 20))
def test_breaks_may_be_where_the_text_is_cut_into_parts(cut: int) -> None:
    assert decoded(b"\n".join(TEXT[at : at + cut] for at in range(0, len(TEXT), cut))) == BODY


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "its data are empty"),
        (b" \n", "its data are empty"),
        (b"data:image/png;base64,", "its data are empty"),
        (TEXT[:-1], "cut off, or wrongly padded"),
        (b"AAA", "cut off, or wrongly padded"),
        (b"A===", "cut off, or wrongly padded"),
        (b"====", "cut off, or wrongly padded"),
        (b"AA==AAAA", 'has "=" in it'),
        (b"AAA=" + b"\n" * (64 << 10) + b"AAAA", "goes on behind its padding"),
        (b"AA-_", 'has "-" in it (the alphabet for URLs is not taken)'),
        (TEXT[:100_000] + b"\x00" + TEXT[100_000:], 'has "\\x00" in it'),
        ("AAAÄ".encode(), "in it"),
        (b"data:image/png," + TEXT, 'its data URI is not in base64: ";base64"'),
        (b"data:,%89PNG", 'its data URI is not in base64: ";base64"'),
        (b"data:image/png;base64" + TEXT, "no comma in its first 256 characters"),
        (b"https://example.org/a,b.png", "is no beginning of a data URI or of base64"),
        (b"hello, world", "is no beginning of a data URI or of base64"),
        (b"\x89PNG\r\n\x1a\n", "in it"),
    ],
)
def test_other_text_is_refused_by_what_is_wrong(text: bytes, said: str) -> None:
    with pytest.raises(ImageRefused) as refused:
        decoded(text)
    assert said in refused.value.message
    assert len(refused.value.message) < 200


def test_no_more_is_decoded_than_an_image_may_have() -> None:
    assert decoded(TEXT, MOST) == BODY
    for text in (TEXT, b"data:image/png;base64," + TEXT, b"A" * 4_000_000):
        with pytest.raises(ImageRefused, match=rf"more than {MOST - 1} bytes, \[images\] max_bytes"):
            decoded(text, MOST - 1)


def test_both_kinds_are_fetched_from_memory() -> None:
    async def go() -> list[bytes]:
        fetcher = Fetcher(FetchLimits(max_bytes=MOST))
        with ImageFile.of(TEXT) as text, ImageFile.of(BODY) as body, ImageFile.of(BODY + b"x") as large:
            files = await fetcher.fetch_all([(Source("data"), text.fd), (Source("bytes"), body.fd)])
            with pytest.raises(ImageRefused, match=f"its file has {MOST + 1} bytes"):
                await fetcher.fetch(Source("bytes"), large.fd)
        read = [file.read() for file in files]
        for file in files:
            file.close()
        return read

    with no_new_descriptors():
        assert asyncio.run(go()) == [BODY, BODY]
