"""Over HTTP: an engine's death is invisible to clients but for the time it takes."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from api.frontend_harness import expected, frames, run, stack, until
from lightllmd.ipc import messages


async def stream_text(one, prompt: str, path: str = "/generate_stream", **body) -> str:
    """The raw SSE body of a stream."""
    answer = await one.client.post(path, json={"inputs": prompt} | body)
    assert answer.status_code == 200, answer.text
    return answer.text


def native_text(raw: str) -> str:
    return "".join(frame["token"]["text"] for frame in frames(raw))


@pytest.mark.parametrize("position", range(13))
def test_stream_is_byte_exact_wherever_the_engine_dies(tmp_path, position):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            whole = asyncio.create_task(stream_text(one, "hello", parameters={"max_new_tokens": 12}))
            await engine.submitted(1)
            for _ in range(min(position, 11)):
                engine.step()
            if position < 12:
                # What the dead one sent may or may not have been read: both are right.
                await until(lambda: one.stats["in_flight"])
                await one.kill()
                engine = await one.up()
                await engine.submitted(1)
                assert engine.submits[0].replay
                assert engine.submits[0].prompt_ids == list(b"hello")
            engine.free_run = True
            raw = await whole
            assert native_text(raw) == expected("hello", 12)
            counts = [frame["token"]["count_output_tokens"] for frame in frames(raw)]
            assert counts == list(range(1, 13))

    run(scenario())


def test_everything_in_flight_survives_five_deaths(tmp_path):
    """Streams and whole answers, greedy and sampled, one sequence and four, both dialects."""

    async def native(one, number):
        body = {"max_new_tokens": 40 + number, "do_sample": True, "seed": number + 1}
        raw = await stream_text(one, f"p{number}", parameters=body)
        assert native_text(raw) == expected(f"p{number}", 40 + number, seed=number + 1)

    async def whole(one, number):
        answer = await one.generate(f"w{number}", max_new_tokens=50, best_of=4, do_sample=True, seed=5)
        assert answer.json()["generated_text"] == [expected(f"w{number}", 50, seed=5, branch=b) for b in range(4)]

    async def chat(one, number):
        body = {
            "messages": [{"role": "user", "content": "x"}],
            "stream": True,
            "max_tokens": 45,
            "temperature": 0,
            "n": 2,
        }
        answer = await one.client.post("/v1/chat/completions", json=body)
        texts = ["", ""]
        for frame in frames(answer.text):
            for choice in frame["choices"]:
                texts[choice["index"]] += choice["delta"].get("content", "")
        prompt = "user: x\nassistant: "
        assert texts == [expected(prompt, 45, branch=b) for b in range(2)]
        assert answer.text.endswith("data: [DONE]\n\n")

    async def unseeded(one, number):
        answer = await one.generate("u", max_new_tokens=30, do_sample=True)
        assert answer.json()["count_output_tokens"] == 30

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            jobs = [work(one, number) for work in (native, whole, chat, unseeded) for number in range(4)]
            running = [asyncio.create_task(job) for job in jobs]
            await engine.submitted(16)
            for death in range(5):
                for _ in range(1 + 2 * death):
                    engine.step()
                    await asyncio.sleep(0.001)
                await one.kill()
                assert one.stats["held"] == 16
                engine = await one.up()
                await engine.submitted(16)
            engine.free_run = True
            await asyncio.gather(*running)
            stats = one.stats
            assert (stats["ok"], stats["failed"], stats["resumed"]) == (16, 0, 80)

    run(scenario())


def test_requests_before_the_first_engine_are_held_and_then_answered(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, hold_keepalive=0.2) as one:
            early = asyncio.create_task(stream_text(one, "early", parameters={"max_new_tokens": 3}))
            await until(lambda: one.stats["held"] == 1)
            (stream,) = await until(lambda: one.worker.revisions.streams)
            begun = stream.last_sent
            await until(lambda: stream.last_sent > begun)
            engine = await one.up()
            engine.free_run = True
            raw = await early
            assert raw.startswith(": held\n\n")
            assert native_text(raw) == expected("early", 3)
            assert not engine.submits[0].replay

    run(scenario())


def test_stream_waiting_in_the_queue_is_kept_alive_too(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, hold_keepalive=0.2) as one:
            engine = await one.up()
            async with one.client.stream("POST", "/generate_stream", json={"inputs": "q"}) as answer:
                assert await anext(answer.aiter_text()) == ": waiting\n\n"
            await until(lambda: engine.aborts)

    run(scenario())


def test_held_too_long_is_504_or_an_error_frame(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, hold_keepalive=0.1) as one:
            whole = asyncio.create_task(one.generate("w", max_new_tokens=3))
            openai = asyncio.create_task(
                one.client.post("/v1/completions", json={"prompt": "w", "stream": True, "max_tokens": 2})
            )
            streamed = asyncio.create_task(stream_text(one, "s", parameters={"max_new_tokens": 3}))
            await until(lambda: one.stats["held"] == 3)
            await one.expire(2)
            (frame,) = frames(await streamed)
            assert frame["status"] == 504
            assert "0.4 s" in frame["message"]
            answer = await whole
            assert answer.status_code == 504
            assert "0.4 s" in answer.json()["message"]
            chunks = frames((await openai).text)
            assert chunks[-1]["error"]["type"] == "timeout_error"
            assert (await openai).text.endswith("data: [DONE]\n\n")

    run(scenario())


def test_death_in_mid_stream_that_nothing_follows_is_an_error_frame(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            running = asyncio.create_task(stream_text(one, "s", parameters={"max_new_tokens": 9}))
            await engine.submitted(1)
            engine.step()
            await until(lambda: next(iter(one.ledger.entries)).branches[0].ids)
            await one.kill()
            await one.expire(1)
            got = frames(await running)
            assert [("token" in frame, frame.get("status")) for frame in got] == [(True, None), (False, 504)]

    run(scenario())


def test_more_held_than_allowed_is_429(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, max_held=2) as one:
            held = [asyncio.create_task(one.generate("h", max_new_tokens=1)) for _ in range(2)]
            await until(lambda: one.stats["held"] == 2)
            answer = await one.generate("one more")
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            (await one.up()).free_run = True
            assert [(await task).status_code for task in held] == [200, 200]

    run(scenario())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/v1/completions"])
def test_rejection_by_the_scheduler_has_its_own_status(tmp_path, path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            engine.reject = messages.Rejected(1, 0, "queue_full", "1024 branches are waiting", 3.0)
            answer = await one.client.post(
                path, json={"inputs": "x"} if "gen" in path else {"prompt": "x", "stream": True}
            )
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "3"
            assert "1024 branches" in answer.text
            engine.reject = messages.Rejected(1, 0, "invalid", "it could never fit")
            assert (await one.generate("x")).status_code == 400

    run(scenario())


def test_poison_gets_its_500_and_the_others_finish(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            good = [asyncio.create_task(one.generate(f"g{i}", max_new_tokens=10)) for i in range(7)]
            await engine.submitted(7)
            engine.step()
            bad = asyncio.create_task(one.generate("bad", max_new_tokens=10))
            await engine.submitted(8)
            number = next(s.request for s in engine.submits if s.prompt_ids == list(b"bad"))
            await until(lambda: all(e.proven for e in one.ledger.entries if e.request != number))
            await one.kill([number])
            for _ in range(3):
                engine = await one.up()
                await engine.submitted(8)
                assert [s.request for s in engine.submits if s.suspect] == [number]
                await one.kill([number], quarantined=number)
            answer = await bad
            assert answer.status_code == 500
            assert "not tried again" in answer.json()["message"]
            engine = await one.up()
            engine.free_run = True
            for i, task in enumerate(good):
                assert (await task).json()["generated_text"] == [expected(f"g{i}", 10)]

    run(scenario())


@pytest.mark.parametrize("fair", [True, False])
def test_each_client_is_a_tenant_over_all_engines_if_admission_is_fair(tmp_path, fair):
    keys = tmp_path / "keys"
    keys.write_text("one\ntwo\n")

    async def scenario():
        async with stack(tmp_path, engine=False, api_keys_file=str(keys), fair_admission=fair) as one:
            asked = [
                asyncio.create_task(
                    one.client.post(
                        "/v1/completions",
                        json={"prompt": ["x"] * prompts, "max_tokens": 1},
                        headers={"Authorization": f"Bearer {key}"},
                    )
                )
                for key, prompts in (("one", 2), ("two", 1))
            ]
            await until(lambda: one.stats["held"] == 3)
            seen = []
            for _ in range(2):
                engine = await one.up()
                await engine.submitted(3)
                seen.append([submit.tenant for submit in engine.submits])
                await one.kill()
            assert seen[0] == seen[1]
            assert sorted(Counter(seen[0]).values()) == ([1, 2] if fair else [3])
            assert fair or set(seen[0]) == {0}
            (await one.up()).free_run = True
            assert [answer.status_code for answer in await asyncio.gather(*asked)] == [200, 200]

    run(scenario())


def test_a_request_that_waited_too_long_in_the_queue_is_told_so(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            engine.reject = messages.Rejected(1, 0, "queue_timeout", "the request waited 600 s", 1.0)
            answer = await one.generate("x")
            assert (answer.status_code, answer.headers["retry-after"]) == (504, "1")
            assert "waited 600 s" in answer.json()["message"]

    run(scenario())


async def raw_request(one, body: dict, path: str = "/generate_stream"):
    reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
    data = json.dumps(body).encode()
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(data), data))
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("path", ["/generate_stream", "/generate"])
@pytest.mark.parametrize("held", [False, True])
def test_client_that_goes_away_gives_its_slots_back(tmp_path, path, held):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            _, writer = await raw_request(one, {"inputs": "x", "parameters": {"max_new_tokens": 50}}, path)
            await engine.submitted(1)
            engine.step()
            if held:
                await one.kill()
            writer.close()
            await until(lambda: one.stats["cancelled"] == 1)
            if held:
                engine = await one.up()
                assert not engine.submits
            else:
                await until(lambda: not engine.running)
            assert one.stats["in_flight"] == 0
            engine.free_run = True
            assert (await one.generate("next", max_new_tokens=1)).status_code == 200

    run(scenario())


def test_client_that_does_not_read_holds_up_nobody(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_total_len": 6000, "max_total_token_num": 6000}) as one:
            _, writer = await raw_request(one, {"inputs": "x", "parameters": {"max_new_tokens": 5000}})
            await until(lambda: one.stats["in_flight"] == 1)
            assert (await one.generate("y", max_new_tokens=20)).json()["generated_text"] == [expected("y", 20)]
            writer.transport.abort()
            await until(lambda: one.stats["in_flight"] == 0)

    run(scenario())
