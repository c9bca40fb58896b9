"""One child process: what it is given to read never holds up whoever starts it."""

from __future__ import annotations

import asyncio
import signal
import sys
import time

from lightllmd.supervisor.children.process import Process

LARGE = b"x" * 5_000_000  # many times a pipe's buffer


def test_a_child_gets_all_of_its_input_and_nobody_waits_for_it() -> None:
    async def run() -> tuple[float, bytes]:
        ended = asyncio.Event()
        count = "import sys; print(len(sys.stdin.buffer.read()))"
        began = time.monotonic()
        process = Process(
            [sys.executable, "-c", count], on_exit=ended.set, on_output=lambda line: None, stdin=LARGE, capture=True
        )
        taken = time.monotonic() - began
        await ended.wait()
        process.reap()
        process.dispose()
        return taken, bytes(process.captured or b"")

    taken, said = asyncio.run(run())
    assert said == b"5000000\n"
    assert taken < 1


def test_a_child_that_never_reads_its_input_can_be_ended() -> None:
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
