"""LightLLM's own routes answer in the documented shapes."""

from __future__ import annotations

import asyncio

import pytest

from api.frontend_harness import EOS, expected, frames, run, stack


def test_generate_answers_one_sequence_with_scalars(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.generate("hello", max_new_tokens=5)
            assert answer.status_code == 200
            assert answer.headers["content-type"] == "application/json"
            assert answer.json() == {
                "generated_text": [expected("hello", 5)],
                "count_output_tokens": 5,
                "finish_reason": "length",
                "prompt_tokens": 5,
            }

    run(scenario())


def test_generate_answers_several_sequences_with_lists(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.generate(
                "hello", max_new_tokens=4, best_of=3, do_sample=True, seed=9, return_details=True
            )
            body = answer.json()
            assert body["generated_text"] == [expected("hello", 4, seed=9, branch=b) for b in range(3)]
            assert body["count_output_tokens"] == [4, 4, 4]
            assert body["finish_reason"] == ["length"] * 3
            assert [len(tokens) for tokens in body["tokens"]] == [4, 4, 4]

    run(scenario())


def test_parameters_are_optional_and_16_tokens_are_the_default(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.post("/generate", json={"inputs": "x"})
            assert answer.json()["count_output_tokens"] == 16
            more = await one.generate("x", min_new_tokens=20)
            assert more.json()["count_output_tokens"] == 20

    run(scenario())


def test_min_p_reaches_the_engine_and_the_one_after_it(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            answer = asyncio.create_task(one.generate("x", max_new_tokens=3, do_sample=True, seed=2, min_p=0.25))
            for _ in range(2):
                await engine.submitted(1)
                assert engine.submits[0].params.min_p == 0.25
                await one.kill()
                engine = await one.up()
            engine.free_run = True
            assert (await answer).json()["generated_text"] == [expected("x", 3, seed=2)]

    run(scenario())


def test_details_show_every_token(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = (await one.generate("abc", max_new_tokens=3, return_details=True)).json()
            text = expected("abc", 3)
            assert body["tokens"] == [
                {
                    "id": ord(text[index]),
                    "text": text[index],
                    "logprob": -0.5,
                    "special": False,
                    "count_output_tokens": index + 1,
                    "prompt_tokens": 3,
                    "prompt_cache_len": 0,
                }
                for index in range(3)
            ]

    run(scenario())


@pytest.mark.parametrize(("path", "extra"), [("/generate_stream", {}), ("/", {"stream": True})])
def test_stream_has_one_frame_per_token_in_the_documented_shape(tmp_path, path, extra):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"inputs": "hello", "parameters": {"max_new_tokens": 6}} | extra
            answer = await one.client.post(path, json=body)
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            got = frames(answer.text)
            text = expected("hello", 6)
            assert len(got) == 6
            for index, frame in enumerate(got):
                last = index == 5
                assert frame == {
                    "token": {
                        "id": ord(text[index]),
                        "text": text[index],
                        "logprob": -0.5,
                        "special": False,
                        "count_output_tokens": index + 1,
                        "prompt_tokens": 5,
                    },
                    "generated_text": None,
                    "finished": last,
                    "finish_reason": "length" if last else None,
                    "details": None,
                }
            assert answer.text.startswith('data:{"token"')

    run(scenario())


def test_root_generates_without_stream(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.post("/", json={"inputs": "q", "parameters": {"max_new_tokens": 2}})
            assert answer.json()["generated_text"] == [expected("q", 2)]

    run(scenario())


@pytest.mark.parametrize("path", ["/generate_stream", "/"])
def test_stream_of_several_sequences_is_refused(tmp_path, path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.post(
                path,
                json={"inputs": "q", "stream": True, "parameters": {"best_of": 2}}
                if path == "/"
                else {"inputs": "q", "parameters": {"best_of": 2}},
            )
            assert answer.status_code == 400
            assert "best_of" in answer.json()["message"]
            assert not one.engine.submits

    run(scenario())


def test_eos_is_counted_and_shown_only_when_asked(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: EOS if position == 3 else 97)).free_run = True
            body = (await one.generate("x", max_new_tokens=9, return_details=True)).json()
            assert (body["generated_text"], body["count_output_tokens"]) == (["aaa"], 4)
            assert body["finish_reason"] == "stop"
            assert [token["special"] for token in body["tokens"]] == [False, False, False, True]
            shown = await one.generate(
                "x",
                max_new_tokens=9,
                print_eos_token=True,
                skip_special_tokens=False,
                add_spaces_between_special_tokens=False,
            )
            assert shown.json()["generated_text"] == ["aaa<eos>"]
            on = await one.generate("x", max_new_tokens=6, ignore_eos=True)
            assert (on.json()["count_output_tokens"], on.json()["finish_reason"]) == (6, "length")

    run(scenario())


@pytest.mark.parametrize("stop", ["lo w", ["zzz", "lo w"], [[108, 111, 32, 119]]])
def test_stop_across_tokens_ends_text_with_the_stop(tmp_path, stop):
    text = b"hello world and more"

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up(token=lambda submit, branch, position: text[position])
            engine.free_run = True
            body = (await one.generate("x", max_new_tokens=18, stop_sequences=stop)).json()
            assert body["generated_text"] == ["hello w"]
            assert (body["count_output_tokens"], body["finish_reason"]) == (7, "stop")
            streamed = await one.client.post(
                "/generate_stream", json={"inputs": "x", "parameters": {"max_new_tokens": 18, "stop_sequences": stop}}
            )
            got = frames(streamed.text)
            assert "".join(frame["token"]["text"] for frame in got) == "hello w"
            assert len(got) == 7
            assert (got[-1]["finished"], got[-1]["finish_reason"]) == (True, "stop")
            assert engine.aborts  # the engine overshoots by a round trip, and is told

    run(scenario())


def test_stop_in_one_branch_lets_the_others_go_on(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            token = lambda submit, branch, position: 65 + branch if position < 3 else 90  # noqa: E731
            engine = await one.up(token=token)
            engine.free_run = True
            body = (await one.generate("x", max_new_tokens=6, n=2, best_of=2, stop_sequences=["BB"])).json()
            assert body["generated_text"] == ["AAAZZZ", "BB"]
            assert body["count_output_tokens"] == [6, 2]
            assert body["finish_reason"] == ["length", "stop"]

    run(scenario())


def test_utf8_split_over_tokens_comes_out_whole(tmp_path):
    raw = "aé漢🙂z".encode()

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: raw[position])).free_run = True
            body = {"inputs": "x", "parameters": {"max_new_tokens": len(raw)}}
            got = frames((await one.client.post("/generate_stream", json=body)).text)
            assert "".join(frame["token"]["text"] for frame in got) == "aé漢🙂z"
            assert len(got) == len(raw)

    run(scenario())


def test_small_routes(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            client = one.client
            for method in ("GET", "POST"):
                assert (await client.request(method, "/tokens", json={"text": "héllo"})).json() == {"ntokens": 6}
                assert (await client.request(method, "/get_model_name")).json() == {"model_name": "fake-model"}
                assert (await client.request(method, "/liveness")).json() == {"status": "ok"}
                assert (await client.request(method, "/readiness")).json() == {"status": "ok"}
            for path in ("/health", "/healthz"):
                assert (await client.get(path)).json() == {"message": "Ok"}
                head = await client.head(path)
                assert (head.status_code, head.content) == (200, b"")
            load = (await client.get("/token_load")).json()
            assert load == {"current_load": 0.0, "logical_max_load": 0.0, "dynamic_max_load": 0.0}
            metrics = await client.get("/metrics")
            assert metrics.headers["content-type"].startswith("text/plain")
            assert (await client.get("/docs")).status_code == 200
            paths = (await client.get("/openapi.json")).json()["paths"]
            assert {"/generate", "/generate_stream", "/", "/v1/chat/completions", "/health"} <= set(paths)

    run(scenario())


def test_health_tells_why_not(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            for path in ("/health", "/healthz", "/readiness"):
                answer = await one.client.get(path)
                assert answer.status_code == 503
                assert "starting" in answer.json()["message"]
                assert int(answer.headers["retry-after"]) >= 1
            assert (await one.client.get("/liveness")).status_code == 200
            await one.up()
            assert (await one.client.get("/readiness")).status_code == 200
            await one.kill()
            answer = await one.client.get("/readiness")
            assert (answer.status_code, answer.json()["message"]) == (503, "the engine died")

    run(scenario())
