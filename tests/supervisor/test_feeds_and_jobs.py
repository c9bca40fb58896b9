"""Histories that are followed, and jobs."""

from __future__ import annotations

import asyncio

import pytest

from lightllmd.errors import NoSuchJob
from lightllmd.supervisor.control.jobs import KEPT, Jobs
from lightllmd.supervisor.journal.feed import Feed
from lightllmd.supervisor.journal.logs import LogBook, text_line


def test_a_slow_follower_loses_the_oldest_and_never_makes_the_feed_grow() -> None:
    async def scenario() -> list[int]:
        feed: Feed[int] = Feed(3)
        feed.add(0)
        batches = feed.follow(idle=10)
        for number in range(1, 10):
            feed.add(number)
        feed.close()
        return [number async for batch in batches for number in batch]

    assert asyncio.run(scenario()) == [7, 8, 9]


def test_a_quiet_feed_says_so() -> None:
    async def scenario() -> list[int]:
        return await anext(Feed[int](3).follow(idle=0.01))

    assert asyncio.run(scenario()) == []


def test_a_job_is_followed_to_its_one_outcome() -> None:
    async def scenario() -> list[str]:
        job = Jobs().open("restart", "engine")
        phases = []
        async for batch in job.follow(idle=10):
            phases += [state.phase for state in batch]
            if phases == ["accepted"]:
                job.advance("loading", 0.5)
                job.finish("done", "generation 2 is ready")
                job.finish("failed", "too late")
        assert job.snapshot.outcome == "done"
        return phases

    assert asyncio.run(scenario()) == ["accepted", "loading", "done"]


def test_finished_jobs_are_forgotten_in_the_end_running_ones_never() -> None:
    jobs = Jobs()
    first = jobs.open("drain")
    for _ in range(KEPT + 10):
        jobs.open("restart").finish("done")
    assert jobs.get(first.snapshot.id) is first
    assert len(jobs.all()) <= KEPT + 2
    with pytest.raises(NoSuchJob):
        jobs.get(2)


def test_log_level_and_priorities_are_honoured() -> None:
    book = LogBook(10, "warning", text_line, None)
    book.write_output("engine-0", "<6>quiet")
    book.write_output("engine-0", "<4>loud")
    book.write_output("engine-0", "<3>louder")
    assert [(line.level, line.message) for line in book.last(10)] == [("warning", "loud"), ("error", "louder")]


def test_a_chatty_worker_does_not_push_out_anothers_lines() -> None:
    book = LogBook(10, "info", text_line, None)
    book.write("engine-0", "error", "last words")
    for number in range(100):
        book.write("api-0", "info", str(number))
    assert [line.message for line in book.last(100, "engine-0")] == ["last words"]
    assert len(book.last(100)) == 11
