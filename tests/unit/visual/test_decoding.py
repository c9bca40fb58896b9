"""An image that is hostile, or whose decoder is killed, disturbs no other image and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import random
import signal
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

import hostile_images as made
from hostile_images import quarters, saved
from leftovers import no_new_descriptors
from lightllmd.errors import NotReady
from lightllmd.visual import decode, sandbox
from lightllmd.visual.decode import ImageDecoder
from lightllmd.visual.image_file import ImageFile, ImageRefused
from lightllmd.visual.limits import DecodeLimits
from long_run import LONG

GOOD = saved(quarters(), "PNG")
LARGE = saved(Image.new("RGB", (6000, 4000)), "JPEG")  # a fifth of a second


@contextlib.asynccontextmanager
async def decoding(**limits: Any) -> AsyncIterator[ImageDecoder]:
    decoder = ImageDecoder(DecodeLimits(**limits))
    try:
        yield decoder
    finally:
        await decoder.close()


async def pixels(decoder: ImageDecoder, data: bytes) -> Image.Image:
    with ImageFile.of(data) as file:
        async with decoder.decoded(file) as picture:
            return picture.image()


async def outcome(decoder: ImageDecoder, data: bytes) -> Any:
    try:
        return await pixels(decoder, data)
    except (ImageRefused, NotReady) as refusal:
        return refusal.message


def run(coroutine: Any) -> Any:
    with no_new_descriptors():
        return asyncio.run(coroutine)


def test_hostile_images_are_refused_and_others_beside_them_are_not() -> None:
    hostile = {
        **{f"{kind}, large": data for kind, data in made.claiming(16_000, 16_000).items()},
        **{f"{kind}, long": data for kind, data in made.claiming(20_000, 10).items()},
        "text": made.text_bomb(b"zTXt", 20 << 20),
        "profile": made.text_bomb(b"iCCP", 20 << 20),
        "cut": GOOD[:-30],
        "SVG": made.SVG,
        "tags": b"II*\0\x08\0\0\0\xff\xff" + os.urandom(200_000),
        "count": made.tiff({256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 273: 8, 277: 1, 278: 64, 279: 0xFFFFFFFF}),
        "own folder": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
        "nothing": b"\0" * 1000,
        "file": b"x" * (1 << 20) + b"x",
    }

    async def go() -> int:
        async with decoding(max_bytes=1 << 20, processes=2) as decoder:
            before = psutil.Process().memory_info().rss
            jobs = [(name, data) for name, data in hostile.items() for data in (data, GOOD)]
            done = await asyncio.gather(*(outcome(decoder, data) for _, data in jobs))
            for (name, data), found in zip(jobs, done, strict=True):
                assert (
                    found == quarters()
                    if data is GOOD
                    else isinstance(found, str) and found.startswith(("its ", "it has "))
                ), name
            assert psutil.Process().memory_info().rss - before < 64 << 20
            return decoder.peak

    assert run(go()) < 160 << 20  # with what the interpreter takes


def test_damaged_images_are_read_or_refused_and_crash_nothing() -> None:
    first, *others = made.frames()
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    seeds = [saved(first, kind) for kind in kinds]
    seeds += [saved(first, kind, save_all=True, append_images=others) for kind in ("GIF", "WEBP", "PNG", "TIFF")]
    seeds += [saved(first, "TIFF", compression=f"tiff_{name}") for name in ("lzw", "jpeg", "deflate")]
    seeds += [saved(first, "JPEG", progressive=True), saved(first.convert("P"), "PNG")]
    draw = random.Random(17)

    async def go() -> None:
        async with decoding() as decoder:
            for _ in range(2500 if LONG else 20):
                pair = [made.damaged(draw.choice(seeds), draw) for _ in range(2)]
                for found in await asyncio.gather(*(outcome(decoder, data) for data in pair)):
                    assert isinstance(found, Image.Image) or found.startswith(("its ", "it has "))
                    assert "makes the decoder fail" not in str(found)
            assert decoder.peak < 256 << 20

    run(go())


def test_five_hundred_at_once_take_their_turns() -> None:
    async def go() -> None:
        async with decoding(processes=2) as decoder:
            await decoder.start()
            forker = psutil.Process(decoder.pid)
            tasks = [asyncio.create_task(outcome(decoder, GOOD[: 60 + number])) for number in range(500)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert len(forker.children()) <= 2
            for task in tasks[20:]:  # a client that goes away
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert await pixels(decoder, GOOD) == quarters()

    run(go())


def test_no_more_pixels_are_held_than_are_decoded_at_a_time() -> None:
    async def go() -> None:
        async with decoding(processes=1) as decoder:
            with ImageFile.of(GOOD) as file:
                async with decoder.decoded(file) as picture:
                    second = asyncio.create_task(pixels(decoder, GOOD))
                    for _ in range(20):
                        await asyncio.sleep(0.005)
                        assert psutil.Process(decoder.pid).children() == []
                    assert picture.image() == quarters()
                assert await second == quarters()
                assert picture.fd == -1

    run(go())


def test_one_that_takes_too_long_is_ended() -> None:
    async def go() -> str:
        async with decoding(timeout=0.05) as decoder:
            await decoder.start()
            return await outcome(decoder, LARGE)

    assert run(go()) == "its file takes more than 0.05 s to decode"


def test_a_forker_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_GRACE", 0.01)

    async def go() -> None:
        async with decoding(timeout=0.05) as decoder:
            await decoder.start()
            os.kill(decoder.pid, signal.SIGSTOP)
            assert "takes more than" in await outcome(decoder, GOOD)
            hung, decoder._limits = decoder.pid, replace(decoder._limits, timeout=60.0)
            assert await pixels(decoder, GOOD) == quarters()
            assert decoder.pid != hung

    run(go())


def test_an_image_survives_the_death_of_the_forker() -> None:
    async def go() -> None:
        async with decoding() as decoder:
            await decoder.start()
            first = decoder.pid
            os.kill(first, signal.SIGSTOP)
            waiting = asyncio.create_task(pixels(decoder, GOOD))
            await asyncio.sleep(0)
            os.kill(first, signal.SIGKILL)
            assert await waiting == quarters()
            assert decoder.pid != first

    run(go())


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGSEGV, "its file makes the decoder fail (SIGSEGV)"),
        (signal.SIGXCPU, "its file takes more than 10 s of CPU time to decode"),
        (signal.SIGKILL, None),  # from outside: tried again
    ],
)
def test_a_decoder_that_dies_is_told_by_how(number: int, said: str | None) -> None:
    async def go() -> None:
        async with decoding() as decoder:
            await decoder.start()
            forker = psutil.Process(decoder.pid)
            found: Any = None
            while True:  # until one was hit
                task = asyncio.create_task(outcome(decoder, LARGE))
                while not (children := forker.children()) and not task.done():
                    await asyncio.sleep(0)
                hit = False
                for child in children:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.send_signal(number)
                        hit = True
                found = await task
                if hit and (said is None or found == said):
                    break
            if said is None:
                assert found.size == (6000, 4000)
            assert await pixels(decoder, GOOD) == quarters()
            assert forker.is_running()

    run(go())


def test_where_no_process_can_be_had_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.sys, "executable", "/bin/false")

    async def go() -> str:
        async with decoding() as decoder:
            return await outcome(decoder, GOOD)

    assert run(go()) == "the process that decodes images does not start"


# --- the sandbox ------------------------------------------------------------------------------------------------------


def confined(act: Callable[[], Any]) -> Any:
    """What `act` returns, or the name of what it raises, in a confined process; how it ended, if by a signal."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            room = sandbox.address_space() + (64 << 20)
            sandbox.confine(memory=room, most_memory=room + (128 << 20), cpu_seconds=5, written=1000)
            try:
                told = act()
            except BaseException as failure:
                told = type(failure).__name__
            os.write(writing, json.dumps(told).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    told = os.read(reading, 4096)
    os.close(reading)
    return json.loads(told) if told else signal.Signals(-os.waitstatus_to_exitcode(status)).name


def test_a_decoder_reaches_nothing_but_its_image() -> None:
    parent, (left, right) = os.getpid(), socket.socketpair()
    target = os.memfd_create("target")
    refused = ("PermissionError", "OSError", "BlockingIOError")
    with left, right:
        assert confined(lambda: Path("/etc/passwd").read_text()) in refused
        assert confined(lambda: os.open("/proc/self/mem", os.O_RDWR)) in refused
        assert confined(lambda: socket.socket().connect(("127.0.0.1", 9))) in refused
        assert confined(lambda: left.send(b"x")) in refused
        assert confined(lambda: os.kill(parent, 0)) in refused
        assert confined(lambda: os.fork()) in refused
        assert confined(lambda: os.execv("/bin/true", ["true"])) in refused
        assert confined(lambda: os.memfd_create("x")) in refused
        assert confined(lambda: os.dup(target)) in refused
        assert confined(lambda: __import__("resource").prlimit(parent, 7)) in refused
    assert confined(lambda: len(bytes(32 << 20))) == 32 << 20
    assert confined(lambda: len(bytes(128 << 20))) == "MemoryError"
    assert confined(lambda: sandbox.allow_memory(1 << 40) or len(mmap.mmap(-1, 100 << 20))) == 100 << 20
    assert confined(lambda: sandbox.allow_memory(1 << 40) or len(bytes(1 << 30))) == "MemoryError"
    assert confined(lambda: os.write(target, bytes(1000)) + os.write(target, b"x")) == "OSError"
    os.close(target)


def test_a_filter_refuses_calls_of_another_machine() -> None:
    """The instructions jump to where they should: each call is allowed by the line behind its own, all else is not."""
    lines = [struct.unpack("HBBI", line) for line in sandbox._program(7, 302, [1, 5])]

    def verdict(architecture: int, number: int, first: int = 0) -> int:
        words = {0: number, 4: architecture, 16: first & 0xFFFFFFFF, 20: first >> 32}
        at, loaded = 0, 0
        while True:
            code, then, otherwise, operand = lines[at]
            at += 1
            if code == 0x06:
                return operand
            if code == 0x20:
                loaded = words[operand]
            else:
                at += then if loaded == operand else otherwise

    allowed, refused = 0x7FFF0000, 0x00050001
    assert [verdict(7, number) for number in (1, 5, 302)] == [allowed] * 3
    assert [verdict(7, number) for number in (0, 2, 6, 301, 303, 1 << 30)] == [refused] * 6
    assert [verdict(7, 302, pid) for pid in (1, 1 << 32)] == [refused] * 2
    assert verdict(8, 1) == refused
