"""One child process: what it is given to read never holds up whoever starts it."""

from __future__ import annotations

import asyncio
import signal
import sys

from lightllmd.supervisor.children.process import Process

LARGE = b"x" * 5_000_000  # many times a pipe's buffer


def test_a_child_gets_all_of_its_input() -> None:
    async def run() -> bytes:
        ended = asyncio.Event()
        count = "import sys; print(len(sys.stdin.buffer.read()))"
        process = Process(
            [sys.executable, "-c", count], on_exit=ended.set, on_output=lambda line: None, stdin=LARGE, capture=True
        )
        await ended.wait()
        process.reap()
        process.dispose()
        return bytes(process.captured or b"")

    assert asyncio.run(run()) == b"5000000\n"


def test_a_child_that_never_reads_its_input_holds_nothing_up_and_can_be_ended() -> None:
    async def run() -> None:
        ended = asyncio.Event()
        process = Process(
            [sys.executable, "-c", "import time; time.sleep(60)"],
            on_exit=ended.set,
            on_output=lambda line: None,
            stdin=LARGE,
        )
        process.send_signal(signal.SIGKILL)
        await ended.wait()
        process.reap()
        process.dispose()

    asyncio.run(run())
