"""What is kept of responses is bounded, its owner's alone, and there for every worker."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from api.frontend_harness import run
from lightllmd.api.dialects.responses.store import Kept, Limits, ResponseStore
from lightllmd.errors import NotReady

MINE, OTHER = b"mine", b"other"
MANY = 1 << 30


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1e-3  # no two uses at the same moment
        return self.now


def kept(name: str, previous: str | None = None, size: int = 10, items: tuple[str, ...] = ()) -> Kept:
    return Kept(name, previous, name.encode().ljust(size, b" "), b"[]", items)


def store(directory: object = "", count: int = 100, size: int = MANY, seconds: float = 60.0, clock=None):
    return ResponseStore(str(directory), Limits(count, size, seconds), clock or Clock())


async def names(one: ResponseStore, response: str, owner: bytes = MINE) -> list[str] | None:
    links = await one.chain(owner, response, MANY)
    return None if links is None else [link.id for link in links]


def test_a_conversation_comes_back_in_its_order_by_any_worker(tmp_path):
    async def scenario():
        one, two = store(tmp_path), store(tmp_path)
        await one.put(MINE, kept("a"))
        await two.put(MINE, kept("b", "a"))
        await one.put(MINE, kept("c", "b"))
        await one.put(MINE, kept("b2", "a"))  # a fork
        for each in (one, two):
            assert await names(each, "c") == ["a", "b", "c"]
            assert await names(each, "b2") == ["a", "b2"]
            assert await each.answer(MINE, "b") == kept("b").answer
        one.close()
        two.close()
        three = store(tmp_path)  # a worker that came later
        assert await names(three, "c") == ["a", "b", "c"]
        three.close()

    run(scenario())


def test_an_owner_sees_nothing_of_another_s():
    async def scenario():
        one = store()
        await one.put(MINE, kept("a", items=("item",)))
        await one.put(OTHER, kept("b", "a", items=("item",)))
        assert await one.answer(OTHER, "a") is None
        assert await names(one, "a", OTHER) is None
        assert await names(one, "b", OTHER) == ["b"]  # what another's chain hangs on isn't followed
        assert not await one.delete(OTHER, "a")
        assert [link.id for link in await one.with_items(MINE, ["item"])] == ["a"]
        assert [link.id for link in await one.with_items(OTHER, ["item"])] == ["b"]
        assert await names(one, "a") == ["a"]
        one.close()

    run(scenario())


def test_a_deleted_one_is_gone_and_what_followed_it_says_so():
    async def scenario():
        one = store()
        for name, previous in (("a", None), ("b", "a"), ("c", "b")):
            await one.put(MINE, kept(name, previous, items=(f"item-{name}",)))
        assert await one.delete(MINE, "b")
        assert not await one.delete(MINE, "b")
        assert await one.answer(MINE, "b") is None
        assert await one.with_items(MINE, ["item-b"]) == []
        links = await one.chain(MINE, "c", MANY)
        assert [(link.id, link.previous) for link in links] == [("c", "b")]
        one.close()

    run(scenario())


def test_number_and_bytes_are_bounded_and_a_conversation_in_use_stays():
    async def scenario():
        one = store(count=3, size=100)
        await one.put(MINE, kept("a"))
        await one.put(MINE, kept("b", "a"))
        await one.put(MINE, kept("x"))
        assert await names(one, "b") == ["a", "b"]  # used now
        await one.put(MINE, kept("c", "b"))
        assert await names(one, "x") is None
        assert await names(one, "c") == ["a", "b", "c"]
        await one.put(MINE, kept("big", size=90))  # with "[]" 92 bytes: no other has room beside it
        assert await names(one, "c") is None
        assert await names(one, "big") == ["big"]
        await one.put(MINE, kept("too big", size=101))
        assert await one.answer(MINE, "too big") is None
        assert await names(one, "big") == ["big"]
        with pytest.raises(OverflowError):
            await one.chain(MINE, "big", 50)
        one.close()

    run(scenario())


def test_what_was_not_used_for_long_expires():
    async def scenario():
        clock = Clock()
        one = store(seconds=60, clock=clock)
        await one.put(MINE, kept("a"))
        await one.put(MINE, kept("b"))
        clock.now += 40
        assert await names(one, "a") == ["a"]
        clock.now += 40
        assert await names(one, "b") is None
        assert await one.answer(MINE, "b") is None
        assert await names(one, "a") == ["a"]
        await one.put(MINE, kept("c"))
        assert not await one.delete(MINE, "b")
        one.close()

    run(scenario())


def test_random_operations_of_two_workers_agree_with_a_plain_model(tmp_path):
    """The model: a dict in the order of use."""
    chance = random.Random(7)

    async def scenario():
        clock = Clock()
        workers = [store(tmp_path, count=6, size=200, clock=clock) for _ in range(2)]
        model: dict[str, tuple[str | None, int]] = {}

        def chain(name: str | None) -> list[str]:
            found: list[str] = []
            while name in model:
                found.insert(0, name)
                name = model[name][0]
            return found

        for number in range(400):
            worker, name = chance.choice(workers), f"r{chance.randrange(max(0, number - 8), number + 1)}"
            match chance.randrange(4):
                case 0 | 1:
                    size, previous = chance.randrange(8, 80), chance.choice([None, *model])
                    await worker.put(MINE, kept(f"r{number}", previous, size))
                    model[f"r{number}"] = (previous, size + 2)
                    while len(model) > 6 or sum(size for _, size in model.values()) > 200:
                        del model[next(iter(model))]
                case 2:
                    assert await names(worker, name) == (chain(name) or None)
                    # All of a chain are used at one moment; which were put before others stay so.
                    used = {one: model[one] for one in model if one in chain(name)}
                    by_age = sorted(used, key=lambda one: int(one[1:]))
                    for one in by_age:
                        model[one] = model.pop(one)
                case 3:
                    assert await worker.delete(MINE, name) == (model.pop(name, None) is not None)
        for worker in workers:
            worker.close()

    run(scenario())


def test_workers_that_write_at_once_wait_for_each_other(tmp_path):
    def work(number: int) -> None:
        async def scenario():
            one = store(tmp_path, count=1000)
            for index in range(50):
                await one.put(MINE, kept(f"{number}-{index}", f"{number}-{index - 1}" if index else None))
            assert len(await names(one, f"{number}-49")) == 50
            one.close()

        asyncio.run(scenario())

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


def test_without_room_nothing_is_kept_and_no_file_made(tmp_path):
    async def scenario():
        one = store(tmp_path, count=0)
        await one.put(MINE, kept("a"))
        assert (await one.answer(MINE, "a"), await names(one, "a"), await one.delete(MINE, "a")) == (None, None, False)
        one.close()
        assert list(tmp_path.iterdir()) == []

    run(scenario())


def test_a_file_that_is_damaged_is_told_as_unavailable(tmp_path):
    async def scenario():
        (tmp_path / "responses.sqlite").write_bytes(b"no database" * 1000)
        one = store(tmp_path)
        with pytest.raises(NotReady, match="the store of responses fails"):
            await one.put(MINE, kept("a"))
        one.close()

    run(scenario())
