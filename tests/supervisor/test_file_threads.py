"""Files that never answer: the caller is told so in time, nothing else waits, and the process can end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from lightllmd.errors import TryAgain, Usage
from lightllmd.supervisor.host.file_threads import MOST, FileThreads

HANGS = """
import asyncio, threading
from lightllmd.supervisor.host.file_threads import FileThreads
async def main():
    try:
        await FileThreads().run("x", threading.Event().wait, timeout=0.05)
    except Exception as late:
        print(late)
asyncio.run(main())
"""


def test_work_that_hangs_is_given_up_and_bounded_and_others_go_on() -> None:
    gate = threading.Event()

    async def run() -> None:
        threads = FileThreads()
        late = [threads.run("reading x", gate.wait, timeout=0.2) for _ in range(MOST - 1)]
        hanging = [asyncio.ensure_future(one) for one in late]
        await asyncio.sleep(0)
        assert await threads.run("reading y", lambda: 7) == 7
        for told in await asyncio.gather(*hanging, return_exceptions=True):
            assert isinstance(told, TryAgain)
            assert "reading x takes longer than 0.2 s" in told.message
        with pytest.raises(TryAgain):
            await threads.run("reading x", gate.wait, timeout=0.01)
        with pytest.raises(TryAgain, match="are being read already"):
            await threads.run("reading y", lambda: 7)
        gate.set()
        while True:
            try:
                assert await threads.run("reading y", lambda: 7) == 7
                return
            except TryAgain:
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_what_work_raises_is_raised() -> None:
    def refuse() -> None:
        raise Usage("no")

    with pytest.raises(Usage, match="no"):
        asyncio.run(FileThreads().run("x", refuse))


def test_a_process_ends_though_its_work_hangs() -> None:
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "takes longer than 0.05 s" in done.stdout
