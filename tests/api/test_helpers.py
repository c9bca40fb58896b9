"""Helper processes: what they do comes back, what they may not take ends them, and none is left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from api.frontend_harness import run, until
from leftovers import wait_ended
from lightllmd.api.helpers import pool as helpers
from lightllmd.api.helpers.pool import Helpers
from lightllmd.errors import InvalidRequest


def echo(value: Any) -> Any:
    return value


def refuse() -> None:
    raise InvalidRequest("x: no", param="x")


def spin() -> None:
    while True:
        pass


def power() -> None:
    """One instruction of Python: no thread, signal handler or clock gets in between."""
    _ = 7 ** (7**9)


def hoard() -> int:
    return len(bytearray(4 << 30))


def pid() -> int:
    return os.getpid()


def nap(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def nap_once(begun: str) -> int:
    """Never ends the first time."""
    if not os.path.exists(begun):
        Path(begun).touch()
        time.sleep(600)
    return os.getpid()


def fall() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


TASKS: dict[str, Callable[..., Any]] = {
    task.__name__: task for task in (echo, refuse, spin, power, hoard, pid, nap, nap_once, fall)
}


@asynccontextmanager
async def started(**options: Any) -> AsyncIterator[Helpers]:
    """And afterwards every process is gone."""
    one = Helpers(TASKS, **options)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    one.start()
    mine = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert mine
    family = mine[0]
    try:
        yield one
    finally:
        kin = [*mine, *(family.children(recursive=True) if family.is_running() else [])]
        one.stop()
        wait_ended(kin)


def test_results_and_refusals_come_back_whatever_their_size() -> None:
    async def scene() -> None:
        async with started() as one:
            for heavy in (False, True):
                text = "é" * (4 << 20)
                assert await one.run("echo", text, heavy=heavy) == text
                assert await one.run("echo", array("i", [1, -2]), heavy=heavy) == array("i", [1, -2])
                with pytest.raises(InvalidRequest, match="x: no") as refused:
                    await one.run("refuse", heavy=heavy)
                assert refused.value.parameters == {"param": "x"}

    run(scene())


@pytest.mark.parametrize("task", ["spin", "power"])
def test_a_task_that_takes_too_long_is_ended_whatever_code_runs(task: str) -> None:
    async def scene() -> None:
        async with started() as one:
            with pytest.raises(InvalidRequest, match=r"takes more than 0\.1 s of CPU time or 512 MB of memory"):
                await one.run(task, heavy=False, seconds=0.1)
            assert await one.run("echo", 1, heavy=False) == 1

    run(scene())


def test_a_task_that_takes_too_much_memory_is_refused() -> None:
    async def scene() -> None:
        async with started() as one:
            with pytest.raises(InvalidRequest, match="512 MB of memory"):
                await one.run("hoard", heavy=True)

    run(scene())


def test_the_loop_goes_on_while_a_task_holds_its_interpreter() -> None:
    async def scene() -> None:
        async with started() as one:
            task = asyncio.create_task(one.run("power", heavy=True, seconds=0.3))
            turns = 0
            while not task.done():
                await asyncio.sleep(0.005)
                turns += 1
            assert turns > 10
            with pytest.raises(InvalidRequest):
                await task

    run(scene())


def test_a_light_helper_stays_and_a_heavy_one_does_not() -> None:
    async def scene() -> None:
        async with started() as one:
            light = {await one.run("pid", heavy=False) for _ in range(3)}
            heavy = [await one.run("pid", heavy=True) for _ in range(3)]
            assert len(light) == 1
            assert len({*heavy, *light, os.getpid()}) == 5
            await until(lambda: not any(psutil.pid_exists(number) for number in heavy))

    run(scene())


def test_no_more_helpers_than_there_is_room_for() -> None:
    async def scene() -> None:
        async with started(light=2, heavy=1) as one:
            light = await asyncio.gather(*(one.run("nap", 0.02, heavy=False) for _ in range(8)))
            assert 1 <= len(set(light)) <= 8
            assert one._room[helpers.LIGHT]._value == 2

    run(scene())


def test_a_helper_or_zygote_that_is_killed_is_replaced_and_the_task_done(tmp_path: Path) -> None:
    async def scene() -> None:
        async with started() as one:
            number = await one.run("pid", heavy=False)
            task = asyncio.create_task(one.run("nap_once", str(tmp_path / "begun"), heavy=False))
            await until((tmp_path / "begun").exists)
            os.kill(number, signal.SIGKILL)
            assert await task != number
            assert one._zygote is not None
            zygote = one._zygote.pid
            os.kill(zygote, signal.SIGKILL)
            await until(lambda: not one._zygote.alive)
            assert await one.run("echo", 5, heavy=False) == 5
            assert one._zygote.pid != zygote

    run(scene())


def test_a_task_that_kills_its_helper_is_refused_after_the_second_one() -> None:
    async def scene() -> None:
        async with started() as one:
            with pytest.raises(InvalidRequest, match="takes more than"):
                await one.run("fall", heavy=False)

    run(scene())


def test_a_helper_that_was_stopped_does_not_hold_a_client_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "_PATIENCE", 1)

    async def scene() -> None:
        async with started() as one:
            number = await one.run("pid", heavy=False)
            os.kill(number, signal.SIGSTOP)
            with pytest.raises(InvalidRequest):
                await one.run("echo", 1, heavy=False, seconds=0.05)
            assert await one.run("echo", 1, heavy=False) == 1
            await until(lambda: not psutil.pid_exists(number))

    run(scene())


def test_a_cancelled_task_ends_its_helper(tmp_path: Path) -> None:
    async def scene() -> None:
        async with started() as one:
            task = asyncio.create_task(one.run("nap_once", str(tmp_path / "begun"), heavy=True))
            await until((tmp_path / "begun").exists)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await one.run("echo", 1, heavy=True) == 1

    run(scene())


def test_helpers_have_no_descriptors_of_the_api_worker(tmp_path: Path) -> None:
    """A listener that stayed open there would take connections that no process answers."""
    (tmp_path / "held").touch()

    async def scene() -> None:
        with open(tmp_path / "held"):
            async with started() as one:
                number = await one.run("pid", heavy=False)
                files = {os.readlink(f"/proc/{number}/fd/{name}") for name in os.listdir(f"/proc/{number}/fd")}
                assert not any("held" in name for name in files)

    run(scene())
