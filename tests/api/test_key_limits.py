"""Limits of a key: what counts, what is refused and told, what comes back, over several workers and killed engines."""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.frontend_harness import run, stack, until
from api.test_api_keys import first_token, table
from lightllmd.api.web.limits import HEADERS
from lightllmd.errors import RequestFailed
from lightllmd.ipc import messages
from lightllmd.ipc.quota import Quota

ALICE = {"x-api-key": "alice"}
STOPPED_CLOCK = 10**15  # nanoseconds


def stop_clock(one: Any) -> Quota:
    """Nothing comes back by the passing of time."""
    quota: Quota = one.worker._leases.quota
    quota._clock = lambda: STOPPED_CLOCK
    return quota


def generate(one: Any, prompt: str = "hello", count: int = 2, path: str = "/generate") -> Any:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": count}}
    return one.client.post(path, json=body, headers=ALICE)


GOLDEN = [
    ("/generate", {"inputs": "x"}, lambda message: {"message": message}),
    ("/generate_stream", {"inputs": "x"}, lambda message: {"message": message}),
    (
        "/v1/completions",
        {"prompt": "x", "stream": True},
        lambda message: {
            "error": {"message": message, "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded"}
        },
    ),
]


def test_requests_per_minute_are_refused_in_each_dialects_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="requests_per_minute = 2")) as one:
            stop_clock(one)
            answers = [await generate(one) for _ in range(2)]
            assert [answer.status_code for answer in answers] == [200, 200]
            assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0"]
            assert answers[0].headers["x-ratelimit-limit-requests"] == "2"
            assert [answer.headers["x-ratelimit-reset-requests"] for answer in answers] == ["30s", "1m0s"]
            for path, body, shape in GOLDEN:
                answer = await one.client.post(path, json=body, headers=ALICE)
                said = "the API key alice has a limit of 2 requests per minute (requests_per_minute)"
                assert (answer.status_code, answer.json()) == (429, shape(said))
                assert answer.headers["retry-after"] == "30"
                assert answer.headers["x-ratelimit-remaining-requests"] == "0"
            # What asks nothing of the engine costs nothing.
            assert (await one.client.get("/v1/models", headers=ALICE)).status_code == 200
            registry = one.worker._accounts._metrics.registry
            labels = {"reason": "requests_per_minute"}
            assert registry.get_sample_value("lightllm_key_refusal_total", labels) == 3

    run(scenario())
    [line] = [one.getMessage() for one in caplog.records if "API key" in one.getMessage()]
    assert line == "429 to 127.0.0.1 for '/generate': API key alice has used up its requests_per_minute"


def test_tgi_clients_are_told_of_limits_as_of_overload(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="max_concurrent = 1")
        async with stack(tmp_path, {"use_tgi_api": True}, engine=False, api_keys_file=file) as one:
            engine = await one.up()
            first = asyncio.create_task(generate(one))
            await engine.submitted(1)
            answer = await generate(one)
            assert answer.status_code == 429
            assert answer.json() == {
                "error": "the API key alice has a limit of 1 requests at a time (max_concurrent)",
                "error_type": "overloaded",
            }
            engine.free_run = True
            assert (await first).status_code == 200
            assert (await generate(one)).status_code == 200

    run(scenario())


def test_tokens_of_prompts_and_of_streams_count_while_they_come(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="tokens_per_minute = 20")
        async with stack(tmp_path, engine=False, api_keys_file=file) as one:
            quota, engine = stop_clock(one), await one.up()
            body = {"inputs": "ten tokens", "parameters": {"max_new_tokens": 30}}
            first = asyncio.create_task(first_token(engine))
            async with one.client.stream("POST", "/generate_stream", json=body, headers=ALICE) as stream:
                await first
                lines = stream.aiter_lines()
                await anext(lines)
                assert stream.headers["x-ratelimit-limit-tokens"] == "20"
                assert stream.headers["x-ratelimit-remaining-tokens"] in ("9", "10")  # the first token is on its way
                # A prompt that finds no room gets no token of the engine.
                refused = await generate(one, "fifteen tokens!")
                assert refused.status_code == 429
                assert "20 tokens per minute, and the prompt has 15 (tokens_per_minute)" in refused.json()["message"]
                assert len(engine.submits) == 1
                for _ in range(14):
                    engine.step()
                await until(lambda: quota.left("alice", "tokens", 20)[1] == 75.0)  # before its end: 25 of 20
                refused = await generate(one, "x")
                assert (refused.status_code, refused.headers["retry-after"]) == (429, "15")
                engine.free_run = True
                rest = [line async for line in lines if line.startswith("data:")]
            assert len(rest) == 29
            assert quota.left("alice", "tokens", 20) == (0, 120.0)

    run(scenario())


def test_a_prompt_that_is_larger_than_the_limit_is_not_to_be_tried_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="tokens_per_minute = 4")) as one:
            answer = await generate(one, "hello")
            assert (answer.status_code, answer.headers["x-should-retry"]) == (429, "false")
            assert "retry-after" not in answer.headers
            assert "so that it will never pass" in answer.json()["message"]
            assert (await generate(one, "hell")).status_code == 200

    run(scenario())


def test_a_killed_engine_charges_nothing_twice(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="tokens_per_minute = 1000\nrequests_per_minute = 10\nmax_concurrent = 1")
        async with stack(tmp_path, engine=False, api_keys_file=file) as one:
            quota, engine = stop_clock(one), await one.up()
            answer = asyncio.create_task(generate(one, "hello", 8))
            await engine.submitted(1)
            engine.step()
            engine.step()
            await until(lambda: quota.left("alice", "tokens", 1000)[0] == 993)
            await one.kill()
            (await one.up()).free_run = True
            assert (await answer).status_code == 200
            assert quota.left("alice", "tokens", 1000)[0] == 1000 - 5 - 8
            assert quota.left("alice", "requests", 10)[0] == 9

    run(scenario())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_fault_of_ours_costs_nothing(tmp_path: Path, streamed: bool) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="tokens_per_minute = 100\nrequests_per_minute = 10\nmax_concurrent = 2")
        async with stack(tmp_path, engine=False, api_keys_file=file) as one:
            quota, engine = stop_clock(one), await one.up()
            answer = asyncio.create_task(generate(one, count=8, path="/generate_stream" if streamed else "/generate"))
            await engine.submitted(1)
            engine.step()
            await until(lambda: quota.left("alice", "tokens", 100)[0] == 94)
            one.ledger.fail_all(RequestFailed("broken"))
            assert (await answer).status_code == (200 if streamed else 500)
            await until(lambda: not one.worker._leases.open)
            assert quota.left("alice", "tokens", 100)[0] == 100
            assert quota.left("alice", "requests", 10)[0] == 10
            one.tell(messages.Drain())
            while (await generate(one)).status_code != 503:
                pass
            assert quota.left("alice", "requests", 10)[0] == 10

    run(scenario())


def test_a_client_whose_own_time_is_over_has_had_what_was_made_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="tokens_per_minute = 100\nrequests_per_minute = 10")
        async with stack(tmp_path, engine=False, api_keys_file=file) as one:
            quota, engine = stop_clock(one), await one.up()
            body, headers = (
                {"inputs": "hello", "parameters": {"max_new_tokens": 50}},
                ALICE | {"x-request-timeout": "0.5"},
            )
            answer = asyncio.create_task(one.client.post("/generate", json=body, headers=headers))
            await engine.submitted(1)
            engine.step()
            assert (await answer).status_code == 504
            assert quota.left("alice", "tokens", 100)[0] == 100 - 5 - 1
            assert quota.left("alice", "requests", 10)[0] == 9

    run(scenario())


def test_a_full_queue_costs_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="tokens_per_minute = 100\nrequests_per_minute = 10")
        async with stack(tmp_path, engine=False, api_keys_file=file) as one:
            quota, engine = stop_clock(one), await one.up()
            engine.reject = messages.Rejected(1, 0, "queue_full", "the queue is full", 1.0)
            answer = await generate(one)
            assert (answer.status_code, answer.headers["x-ratelimit-limit-tokens"]) == (429, "100")
            assert quota.left("alice", "tokens", 100)[0] == 100
            assert quota.left("alice", "requests", 10)[0] == 10

    run(scenario())


def test_a_client_that_leaves_has_had_what_was_made_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        file = table(tmp_path, alice="tokens_per_minute = 100\nrequests_per_minute = 10\nmax_concurrent = 1")
        async with stack(tmp_path, engine=False, api_keys_file=file) as one:
            quota, engine = stop_clock(one), await one.up()
            for number, path in enumerate(("/generate", "/generate_stream"), 1):
                answer = asyncio.create_task(generate(one, count=50, path=path))
                await engine.submitted(number)
                engine.step(only={engine.submits[-1].request})
                await one.token()
                answer.cancel()
                await asyncio.gather(answer, return_exceptions=True)
                await until(lambda: not one.worker._leases.open)
            assert quota.left("alice", "tokens", 100)[0] == 100 - 2 * (5 + 1)
            assert quota.left("alice", "requests", 10)[0] == 8
            engine.free_run = True
            assert (await generate(one)).status_code == 200

    run(scenario())


def test_several_workers_share_a_limit_and_what_a_dead_one_had_is_free(tmp_path: Path) -> None:
    shared = Quota()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    async def scenario() -> None:
        file = table(tmp_path, alice="requests_per_minute = 5\nmax_concurrent = 2")
        first, second = (stack(tmp_path / name, engine=False, api_keys_file=file) for name in "ab")
        async with first as one, second as two:
            for column, each in enumerate((one, two)):
                each.worker._leases.quota.close()
                each.worker._leases.quota = Quota(os.dup(shared.fd), column)
            engines = [await one.up(), await two.up()]
            held = [asyncio.create_task(generate(each)) for each in (one, two)]
            for engine in engines:
                await engine.submitted(1)
            assert [(await generate(each)).status_code for each in (one, two)] == [429, 429]
            shared.clear(0)  # as the supervisor does when the first is dead
            third = asyncio.create_task(generate(two))
            await engines[1].submitted(2)
            for engine in engines:
                engine.free_run = True
            assert [answer.status_code for answer in await asyncio.gather(*held, third)] == [200] * 3
            statuses = [(await generate(each)).status_code for each in (one, two, one)]
            assert statuses == [200, 200, 429]

    run(scenario())
    shared.close()


def test_clients_of_anthropic_get_the_headers_that_they_read(tmp_path: Path) -> None:
    body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": "hello"}]}

    async def scenario() -> list[httpx.Response]:
        file = table(tmp_path, alice="requests_per_minute = 2\ntokens_per_minute = 5000")
        async with stack(tmp_path, api_keys_file=file) as one:
            stop_clock(one)
            return [await one.client.post("/v1/messages", json=body, headers=ALICE) for _ in range(3)]

    *_, refused = answers = run(scenario())
    for answer in answers:
        told = {name: value for name, value in answer.headers.items() if "ratelimit" in name}
        assert set(told) == {
            f"anthropic-ratelimit-{bucket}-{what}"
            for bucket in ("requests", "tokens")
            for what in ("limit", "remaining", "reset")
        }
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", told["anthropic-ratelimit-requests-reset"])
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "30")
    error = refused.json()
    assert error["type"] == "error"
    assert error["error"] == {
        "type": "rate_limit_error",
        "message": "the API key alice has a limit of 2 requests per minute (requests_per_minute)",
    }


def test_a_key_without_limits_gets_no_headers_of_limits(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="")) as one:
            answer = await generate(one)
            assert answer.status_code == 200
            assert not set(answer.headers) & set(HEADERS)

    run(scenario())


def test_a_keys_weight_goes_to_the_scheduler_with_its_requests(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, api_keys_file=table(tmp_path, alice="weight = 3", bob="")) as one:
            for key in ("alice", "bob"):
                await one.client.post("/generate", json={"inputs": "x"}, headers={"x-api-key": key})
            first, second = one.engine.submits
            assert (first.weight, second.weight) == (3.0, 1.0)
            assert first.tenant != second.tenant

    run(scenario())
