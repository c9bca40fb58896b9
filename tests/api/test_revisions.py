"""One worker, several revisions: each answer is wholly one model's, whatever is prepared, committed and forgotten."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
import pytest

from api.frontend_harness import Stack, expected, frames, make_plan, run, stack, until
from lightllmd.api import worker
from lightllmd.config.plan import ModelFacts, encode_plan
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.ipc import messages
from lightllmd.text import load_tokenizer

OTHER = 77  # the seed by which the second model's tokens differ


def other_tokens(submit: messages.Submit, branch: int, position: int) -> int:
    return fake_token(submit.prompt_ids, OTHER, branch, position)


def other(prompt: str, count: int) -> str:
    return expected(prompt, count, seed=OTHER)


def text_of(raw: str) -> str:
    return "".join(frame["token"]["text"] for frame in frames(raw))


async def generate(one: Stack, prompt: str, count: int = 4) -> str:
    answer = await one.generate(prompt, max_new_tokens=count)
    assert answer.status_code == 200, answer.text
    return answer.json()["generated_text"][0]


def streaming(one: Stack, prompt: str, count: int = 4) -> asyncio.Task[httpx.Response]:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": count}}
    return asyncio.create_task(one.client.post("/generate_stream", json=body))


@dataclass
class Slow:
    """Stands in for load_tokenizer: every call but the first waits for `go`, in whatever thread it runs."""

    go: threading.Event
    calls: int = 0

    def __call__(self, plan: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls > 1:
            assert self.go.wait(120)
        return load_tokenizer(plan, **options)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Any:
    slow = Slow(threading.Event())
    monkeypatch.setattr(worker, "load_tokenizer", slow)
    yield slow
    slow.go.set()


# --- prepare, commit, forget ---------------------------------------------------------------------------------------


def test_each_answer_is_of_the_revision_in_force_when_the_request_came(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            first = await one.up()
            early = streaming(one, "early", 9)
            await first.submitted(1)
            first.step()
            await one.prepare(2, make_plan(model="other"))
            second = await one.up(2, token=other_tokens)
            second.free_run = True
            still = asyncio.create_task(generate(one, "still"))
            await first.submitted(2)
            one.tell(messages.Commit(2))
            await until(lambda: one.worker.revisions.number == 2)
            assert await generate(one, "late") == other("late", 4)
            name = await one.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert name.json()["model"] == "other"
            assert (one.stats["in_flight"], one.stats["in_flight@1"], one.stats["in_flight@2"]) == (2, 2, 0)
            first.free_run = True
            assert await still == expected("still", 4)
            assert text_of((await early).text) == expected("early", 9)
            one.tell(messages.Forget(1, "it is replaced"))
            await until(lambda: "in_flight@1" not in one.stats)
            assert (one.stats["ok"], one.stats["failed"], one.stats["in_flight@2"]) == (4, 0, 0)

    run(scenario())


def test_streams_go_on_while_a_tokenizer_loads_and_its_engine_is_remembered(tmp_path, slow):
    async def scenario():
        async with stack(tmp_path) as one:
            one.tell(messages.Prepare(2, encode_plan(make_plan(model="other"))))
            second = one.launch(2, token=other_tokens)
            await until(lambda: slow.calls == 2)
            assert text_of((await streaming(one, "meanwhile", 30)).text) == expected("meanwhile", 30)
            assert not second.heard
            slow.go.set()
            assert (await one.answer(messages.Prepared, 2)).error == ""
            second.free_run = True
            one.tell(messages.Commit(2))
            await until(lambda: one.worker.revisions.number == 2)
            assert await generate(one, "now") == other("now", 4)

    run(scenario())


def test_engine_that_dies_while_its_revision_is_prepared_is_not_connected_to(tmp_path, slow):
    async def scenario():
        async with stack(tmp_path) as one:
            one.tell(messages.Prepare(2, encode_plan(make_plan())))
            dead = one.launch(2)
            one.tell(messages.EngineDown(one.generation, "killed", [], revision=2))
            await until(lambda: slow.calls == 2)
            slow.go.set()
            await one.answer(messages.Prepared, 2)
            one.tell(messages.Commit(2))
            await until(lambda: one.worker.revisions.number == 2)
            assert not one.ledger.connected
            assert not dead.heard

    run(scenario())


def test_revision_that_can_t_be_prepared_is_told_of_and_changes_nothing(tmp_path):
    facts = ModelFacts(str(tmp_path / "gone"), "safetensors", "llama", {}, [], 0, 0, None, None, [], True, False)
    plans = [encode_plan(msgspec.structs.replace(make_plan(), model=facts)), b"garbage"]

    async def scenario():
        async with stack(tmp_path) as one:
            for number, plan in enumerate(plans, 2):
                one.tell(messages.Prepare(number, plan))
                assert (await one.answer(messages.Prepared, number)).error
                one.tell(messages.Commit(number))  # nobody should; it must not break what serves
                one.tell(messages.EngineUp(9, "ipc:///nowhere", number))
                assert await generate(one, "x") == expected("x", 4)
                assert f"in_flight@{number}" not in one.stats

    run(scenario())


def test_revision_given_up_while_it_is_prepared_never_comes(tmp_path, slow):
    async def scenario():
        async with stack(tmp_path) as one:
            one.tell(messages.Prepare(2, encode_plan(make_plan())))
            await until(lambda: slow.calls == 2)
            one.tell(messages.Forget(2, "rolled back"))
            await generate(one, "x")  # heard behind it
            slow.go.set()
            assert (await one.answer(messages.Prepared, 2)).error
            assert "in_flight@2" not in one.stats

    run(scenario())


def test_request_between_the_gate_and_the_ledger_keeps_its_revision_alive(tmp_path, monkeypatch):
    """A long prompt is tokenised in a thread; the commit comes meanwhile."""

    async def scenario():
        async with stack(tmp_path) as one:
            texts, go = one.worker.revisions.current.texts, asyncio.Event()
            encode = texts.encode

            async def slowly(*arguments: Any, **options: Any) -> list[list[int]]:
                await go.wait()
                return await encode(*arguments, **options)

            monkeypatch.setattr(texts, "encode", slowly)
            waiting = asyncio.create_task(generate(one, "long"))
            await until(lambda: one.stats["in_flight@1"] == 1)
            await one.prepare(2, make_plan())
            (await one.up(2, token=other_tokens)).free_run = True
            one.tell(messages.Commit(2))
            await until(lambda: one.worker.revisions.number == 2)
            assert await generate(one, "new") == other("new", 4)
            assert one.stats["in_flight@1"] == 1
            go.set()
            assert await waiting == expected("long", 4)
            await until(lambda: one.stats["in_flight@1"] == 0)

    run(scenario())


# --- the same model goes on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("up_before", [False, True], ids=["held first", "replayed at once"])
def test_carried_request_goes_on_in_the_next_revision_byte_for_byte(tmp_path, up_before, monkeypatch):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            first = await one.up()
            texts, go = one.worker.revisions.current.texts, asyncio.Event()
            stream, whole = streaming(one, "s", 12), asyncio.create_task(generate(one, "w", 12))
            await first.submitted(2)
            for _ in range(5):
                first.step()
            await until(lambda: all(entry.generated == 5 for entry in one.ledger.entries))
            encode = texts.encode

            async def slowly(*arguments: Any, **options: Any) -> list[list[int]]:
                await go.wait()
                return await encode(*arguments, **options)

            monkeypatch.setattr(texts, "encode", slowly)
            entering = asyncio.create_task(generate(one, "entering"))
            await until(lambda: one.stats["in_flight@1"] == 3)
            await one.prepare(2, make_plan())
            if up_before:
                await one.up(2)
            else:
                one.tell(messages.EngineDown(1, "asleep", [], revision=1))
                await until(lambda: one.stats["held"] == 2)
            one.tell(messages.Commit(2, carry=True))
            await until(lambda: one.stats["in_flight@2"] == 2)
            one.tell(messages.Forget(1, "it is replaced"))
            second = one.engine if up_before else await one.up(2)
            await second.submitted(2)
            assert [(s.replay, [len(ids) for ids in s.emitted]) for s in second.submits] == [(True, [5])] * 2
            second.free_run = True
            go.set()
            assert text_of((await stream).text) == expected("s", 12)
            assert await whole == expected("w", 12)
            assert await entering == expected("entering", 4)
            assert (one.stats["ok"], one.stats["failed"], one.stats["resumed"]) == (3, 0, 2)
            assert len(first.submits) == 2

    run(scenario())


def test_carried_request_that_the_next_engine_can_t_take_is_told_so(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            first = await one.up()
            stream, whole = streaming(one, "s", 12), asyncio.create_task(one.generate("w", max_new_tokens=12))
            await first.submitted(2)
            first.step()
            await until(lambda: all(entry.generated == 1 for entry in one.ledger.entries))
            await one.prepare(2, make_plan())
            second = await one.up(2)
            second.reject = messages.Rejected(2, 0, "invalid", "13 tokens are more than the cache holds")
            one.tell(messages.Commit(2, carry=True))
            assert frames((await stream).text)[-1] == {"message": second.reject.message, "status": 400}
            refused = await whole
            assert (refused.status_code, refused.json()["message"]) == (400, second.reject.message)

    run(scenario())


# --- forced to an end ----------------------------------------------------------------------------------------------


def test_forgotten_revision_s_requests_end_with_an_honest_finish_or_error(tmp_path):
    reason = "the model was replaced by force"

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            first = await one.up()
            chat = {"messages": [{"role": "user", "content": "c"}], "stream": True, "max_tokens": 9}
            completion = {"prompt": "t", "stream": True, "max_tokens": 9, "stream_options": {"include_usage": True}}
            begun = [
                streaming(one, "s", 9),
                asyncio.create_task(one.client.post("/v1/chat/completions", json=chat)),
                asyncio.create_task(one.client.post("/v1/completions", json=completion)),
            ]
            await first.submitted(3)
            for _ in range(2):
                first.step()
            await until(lambda: all(entry.generated == 2 for entry in one.ledger.entries))
            await until(lambda: all(stream.started for stream in one.worker.revisions.streams))
            silent = streaming(one, "silent", 9)
            whole = asyncio.create_task(one.generate("w", max_new_tokens=9))
            await first.submitted(5)
            await one.prepare(2, make_plan())
            (await one.up(2, token=other_tokens)).free_run = True
            one.tell(messages.Commit(2))
            one.tell(messages.Forget(1, reason))

            native = frames((await begun[0]).text)
            assert [frame["finish_reason"] for frame in native] == [None, None, "abort"]
            assert "".join(frame["token"]["text"] for frame in native) == expected("s", 2)
            assert (native[-1]["finished"], native[-1]["token"]["count_output_tokens"]) == (True, 2)
            for answer in begun[1:]:
                raw = (await answer).text
                assert raw.endswith("data: [DONE]\n\n")
                reasons = [choice["finish_reason"] for frame in frames(raw) for choice in frame["choices"]]
                assert [reason for reason in reasons if reason] == ["abort"]
            assert frames((await begun[2]).text)[-1]["usage"]["completion_tokens"] == 2
            for refused in (await silent, await whole):
                assert (refused.status_code, refused.json()["message"]) == (503, reason)
                assert refused.headers["retry-after"]
            await until(lambda: len(first.aborts) == 5)
            assert await generate(one, "next") == other("next", 4)
            assert (one.stats["failed"], one.stats["ok"], one.stats["in_flight"]) == (5, 1, 0)

    run(scenario())


def test_revision_in_force_is_not_forgotten(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.tell(messages.Forget(1, "by mistake"))
            assert await generate(one, "x") == expected("x", 4)

    run(scenario())


# --- names -----------------------------------------------------------------------------------------------------------


def test_name_in_a_request_is_the_served_one_or_told_which_is(tmp_path):
    async def ask(one: Stack, name: str | None) -> httpx.Response:
        body = {"prompt": "x", "max_tokens": 1} | ({} if name is None else {"model": name})
        return await one.client.post("/v1/completions", json=body)

    async def scenario():
        async with stack(tmp_path, plan=make_plan(model="small")) as one:
            for name in (None, "small", "whatever"):
                assert (await ask(one, name)).status_code == 200
            one.tell(messages.Models(["large", "small"]))
            await until(lambda: one.worker.revisions.names)
            assert [(await ask(one, name)).status_code for name in (None, "small", "large", "huge")] == [
                200,
                200,
                503,
                404,
            ]
            unserved = await ask(one, "large")
            assert "'small'" in unserved.json()["error"]["message"]
            assert unserved.headers["retry-after"]
            unknown = (await ask(one, "huge")).json()["error"]
            assert unknown["code"] == "model_not_found"
            assert "small, large" in unknown["message"]
            stream = {"prompt": "x", "stream": True, "model": "huge"}
            assert (await one.client.post("/v1/completions", json=stream)).status_code == 404
            listed = (await one.client.get("/v1/models")).json()["data"]
            assert [(card["id"], card["served"]) for card in listed] == [("small", True), ("large", False)]
            assert (await one.client.get("/v1/models/large")).json()["served"] is False
            assert (await one.client.get("/v1/models/huge")).status_code == 404

            await one.prepare(2, make_plan(model="large"))
            (await one.up(2, token=other_tokens)).free_run = True
            one.tell(messages.Commit(2))
            await until(lambda: one.worker.revisions.number == 2)
            assert [(await ask(one, name)).status_code for name in (None, "small", "large")] == [200, 503, 200]
            assert (await one.client.get("/get_model_name")).json()["model_name"] == "large"
            one.tell(messages.Models([]))
            await until(lambda: not one.worker.revisions.names)
            assert (await ask(one, "whatever")).status_code == 200

    run(scenario())


def test_names_of_the_first_plan_hold_until_others_are_told(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan(model="small", names=["small", "large"])) as one:
            listed = (await one.client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in listed] == ["small", "large"]

    run(scenario())


# --- probes, settings ------------------------------------------------------------------------------------------------


def test_probe_runs_one_token_and_counts_nowhere(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            one.tell(messages.Probe(1))
            assert (await one.answer(messages.Probed, 1)).error
            engine = await one.up()
            one.tell(messages.Drain())  # the engine's health is asked for while nobody else is let in
            one.tell(messages.Probe(2))
            await engine.submitted(1)
            assert (engine.submits[0].params.max_new_tokens, one.stats["in_flight"]) == (1, 1)
            engine.step()
            assert (await one.answer(messages.Probed, 2)).error == ""
            assert one.stats.items() >= {"ok": 0, "failed": 0, "resumed": 0, "in_flight": 0}.items()

    run(scenario())


def test_probe_fails_at_once_when_the_engine_does(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            one.tell(messages.Probe(1))
            await engine.submitted(1)
            await one.kill()
            assert "down" in (await one.answer(messages.Probed, 1)).error
            assert one.stats["in_flight"] == one.stats["failed"] == 0
            engine = await one.up()
            assert not engine.submits
            engine.reject = messages.Rejected(2, 0, "queue_full", "the queue is full", 1.0)
            one.tell(messages.Probe(2))
            assert (await one.answer(messages.Probed, 2)).error == "the queue is full"

    run(scenario())


def test_tune_sets_the_log_level(tmp_path):
    before = logging.getLogger().level

    async def scenario():
        async with stack(tmp_path) as one:
            one.tell(messages.Tune("error", 1.0, 10.0))
            await until(lambda: logging.getLogger().level == logging.ERROR)

    try:
        run(scenario())
    finally:
        logging.getLogger().setLevel(before)
