"""The OpenAI routes speak as OpenAI's clients expect."""

from __future__ import annotations

import json

import msgspec
import pytest

from api.frontend_harness import EOS, expected, frames, make_plan, run, stack
from lightllmd.config.plan import ModelFacts

UNCACHED = {"prompt_tokens_details": {"cached_tokens": 0}}
CHAT = "user: hi\nassistant: "
HI = [{"role": "user", "content": "hi"}]


def sdk_stream(raw: str) -> list[dict]:
    """As OpenAI's SDK reads: lines, `data: ` prefix, [DONE] ends, an `error` member raises."""
    chunks = []
    for line in raw.splitlines():
        if not line or line.startswith(":"):
            continue
        assert line.startswith("data: "), line
        data = line.removeprefix("data: ")
        if data == "[DONE]":
            return chunks
        chunk = json.loads(data)
        assert "error" not in chunk
        chunks.append(chunk)
    raise AssertionError("no [DONE]")


def test_chat_answers_in_openai_s_shape(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.post(
                "/v1/chat/completions", json={"model": "any", "messages": HI, "max_tokens": 5, "temperature": 0}
            )
            body = answer.json()
            assert answer.headers["content-type"] == "application/json"
            assert body["id"].startswith("chatcmpl-")
            assert (body["object"], body["model"]) == ("chat.completion", "fake-model")
            assert isinstance(body["created"], int)
            assert body["choices"] == [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": expected(CHAT, 5), "refusal": None},
                    "logprobs": None,
                    "finish_reason": "length",
                }
            ]
            assert body["usage"] == {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25} | UNCACHED

    run(scenario())


def test_chat_stream_has_role_content_finish_usage_and_done(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {
                "messages": HI,
                "max_completion_tokens": 5,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            answer = await one.client.post("/v1/chat/completions", json=body)
            chunks = sdk_stream(answer.text)
            assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
            assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
            assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            *content, usage = chunks
            text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in content)
            assert text == expected(CHAT, 5)
            assert [chunk["choices"][0]["finish_reason"] for chunk in content][-1] == "length"
            assert all(chunk["usage"] is None for chunk in content)
            assert usage["choices"] == []
            assert usage["usage"] == {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25} | UNCACHED
            plain = await one.client.post(
                "/v1/chat/completions", json={k: v for k, v in body.items() if k != "stream_options"}
            )
            assert all("usage" not in chunk for chunk in sdk_stream(plain.text))

    run(scenario())


def test_max_tokens_defaults_to_what_fits(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 60, "max_req_total_len": 100}) as one:
            answer = await one.client.post("/v1/chat/completions", json={"messages": HI})
            assert (
                answer.json()["usage"] == {"prompt_tokens": 20, "completion_tokens": 80, "total_tokens": 100} | UNCACHED
            )

    run(scenario())


def test_temperature_one_is_the_default_and_zero_is_greedy(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for extra, sampled in (({}, True), ({"temperature": 0}, False), ({"do_sample": False}, False)):
                await one.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1} | extra)
                assert one.engine.submits[-1].params.do_sample is sampled
            await one.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "seed": -5})
            assert 0 <= one.engine.submits[-1].params.seed < 2**63

    run(scenario())


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("abc", ["abc"]),
        (["abc", "de"], ["abc", "de"]),
        ([97, 98, 99], ["abc"]),
        ([[97], [98, 99]], ["a", "bc"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_completions_take_every_kind_of_prompt(tmp_path, prompt, texts, stream):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "n": 2, "stream": stream}
            answer = await one.client.post("/v1/completions", json=body)
            want = [expected(text, 4, branch=branch) for text in texts for branch in range(2)]
            if stream:
                got = [""] * len(want)
                for chunk in sdk_stream(answer.text):
                    assert chunk["object"] == "text_completion"
                    for choice in chunk["choices"]:
                        got[choice["index"]] += choice["text"]
                assert got == want
            else:
                choices = answer.json()["choices"]
                assert [choice["text"] for choice in choices] == want
                assert [choice["index"] for choice in choices] == list(range(len(want)))
                tokens = sum(map(len, texts))
                assert answer.json()["usage"]["prompt_tokens"] == tokens
                assert answer.json()["usage"]["completion_tokens"] == 4 * len(want)

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": ["one ", "two "], "max_tokens": 3, "temperature": 0, "echo": True, "stream": stream}
            answer = await one.client.post("/v1/completions", json=body)
            want = ["one " + expected("one ", 3), "two " + expected("two ", 3)]
            if stream:
                got = ["", ""]
                for chunk in sdk_stream(answer.text):
                    for choice in chunk["choices"]:
                        got[choice["index"]] += choice["text"]
            else:
                got = [choice["text"] for choice in answer.json()["choices"]]
            assert got == want

    run(scenario())


def test_best_of_returns_the_likeliest(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            answer = await one.client.post(
                "/v1/completions", json={"prompt": "x", "max_tokens": 3, "n": 1, "best_of": 3, "temperature": 0}
            )
            body = answer.json()
            assert len(body["choices"]) == 1
            assert body["usage"]["completion_tokens"] == 9
            assert one.engine.submits[-1].params.n == 3

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["lo w", ["nope", "lo w"]])
def test_stop_is_excluded_and_never_shown_in_part(tmp_path, stream, stop):
    text = b"hello lo world"

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: text[position])).free_run = True
            body = {"messages": HI, "max_tokens": 14, "stop": stop, "stream": stream}
            answer = await one.client.post("/v1/chat/completions", json=body)
            if stream:
                pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in sdk_stream(answer.text)]
                whole = "".join(pieces)
                seen = ""
                for piece in pieces:
                    seen += piece
                    assert "hello ".startswith(seen[: len("hello ")])
                    assert len(seen) <= len("hello ")
                reason = sdk_stream(answer.text)[-1]["choices"][0]["finish_reason"]
            else:
                choice = answer.json()["choices"][0]
                whole, reason = choice["message"]["content"], choice["finish_reason"]
                assert answer.json()["usage"]["completion_tokens"] == 10
            assert (whole, reason) == ("hello ", "stop")

    run(scenario())


def test_what_looked_like_a_stop_comes_out_when_it_was_none(tmp_path):
    text = b"hello lo x"

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: text[position])).free_run = True
            for stream in (False, True):
                body = {"prompt": "x", "max_tokens": 9, "stop": "lo w", "stream": stream}
                answer = await one.client.post("/v1/completions", json=body)
                if stream:
                    whole = "".join(chunk["choices"][0]["text"] for chunk in sdk_stream(answer.text))
                else:
                    whole = answer.json()["choices"][0]["text"]
                assert whole == "hello lo "

    run(scenario())


def test_chat_logprobs(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"messages": HI, "max_tokens": 3, "temperature": 0, "logprobs": True, "top_logprobs": 2}
            answer = await one.client.post("/v1/chat/completions", json=body)
            content = answer.json()["choices"][0]["logprobs"]["content"]
            text = expected(CHAT, 3)
            assert [token["token"] for token in content] == list(text)
            assert content[0] == {
                "token": text[0],
                "logprob": -0.5,
                "bytes": [ord(text[0])],
                "top_logprobs": [
                    {"token": text[0], "logprob": -0.5, "bytes": [ord(text[0])]},
                    {"token": "A", "logprob": -1.5, "bytes": [65]},
                ],
            }
            assert one.engine.submits[-1].params.top_logprobs == 2
            streamed = await one.client.post("/v1/chat/completions", json=body | {"stream": True})
            tokens = []
            for chunk in sdk_stream(streamed.text):
                logprobs = chunk["choices"][0]["logprobs"]
                tokens += [token["token"] for token in logprobs["content"]] if logprobs else []
            assert tokens == list(text)

    run(scenario())


def test_completion_logprobs(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": "x", "max_tokens": 3, "temperature": 0, "logprobs": 2}
            text = expected("x", 3)
            for stream in (False, True):
                answer = await one.client.post("/v1/completions", json=body | {"stream": stream})
                parts = (
                    [chunk["choices"][0]["logprobs"] for chunk in sdk_stream(answer.text)]
                    if stream
                    else [answer.json()["choices"][0]["logprobs"]]
                )
                merged = {key: [value for part in parts for value in part[key]] for key in parts[0]}
                assert merged == {
                    "tokens": list(text),
                    "token_logprobs": [-0.5] * 3,
                    "top_logprobs": [{char: -0.5, "A": -1.5} for char in text],
                    "text_offset": [1, 2, 3],
                }
            alone = await one.client.post("/v1/completions", json=body | {"logprobs": 0})
            assert alone.json()["choices"][0]["logprobs"]["top_logprobs"] == [{char: -0.5} for char in text]

    run(scenario())


def test_eos_ends_with_stop_and_is_counted(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: EOS if position == 2 else 97)).free_run = True
            answer = await one.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 9})
            choice = answer.json()["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == ("aa", "stop")
            assert answer.json()["usage"]["completion_tokens"] == 3

    run(scenario())


def test_fields_without_effect_and_idle_features_are_accepted(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {
                "model": "gpt-4",
                "messages": [
                    {"role": "system", "content": "be kind"},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                        "name": "me",
                    },
                    {"role": "assistant", "content": "c", "refusal": None, "tool_calls": None, "annotations": []},
                    {"role": "user", "content": "d"},
                ],
                "max_tokens": 2,
                "user": "u",
                "metadata": {"a": "b"},
                "store": False,
                "parallel_tool_calls": True,
                "tools": [],
                "tool_choice": "none",
                "response_format": {"type": "text"},
                "logit_bias": {},
                "stop": None,
                "n": None,
                "seed": None,
                "stream": False,
                "top_k": 5,
                "min_p": 0.25,
                "repetition_penalty": 1.1,
                "ignore_eos": True,
                "min_tokens": 1,
                "presence_penalty": -0.5,
            }
            answer = await one.client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            params = one.engine.submits[-1].params
            assert (params.top_k, params.min_p, params.repetition_penalty) == (5, 0.25, 1.1)
            assert (params.ignore_eos, params.presence_penalty) == (True, -0.5)
            assert (
                bytes(one.engine.submits[-1].prompt_ids)
                == b"system: be kind\nuser: a\nb\nassistant: c\nuser: d\nassistant: "
            )

    run(scenario())


def test_models(tmp_path):
    async def scenario():
        async with stack(tmp_path, served_model_name="my-model") as one:
            answer = (await one.client.get("/v1/models")).json()
            assert answer["object"] == "list"
            assert [(card["id"], card["object"]) for card in answer["data"]] == [("my-model", "model")]
            assert (await one.client.get("/v1/models/my-model")).json()["id"] == "my-model"
            missing = await one.client.get("/v1/models/other")
            assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
            completion = await one.client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert completion.json()["model"] == "my-model"

    run(scenario())


def test_several_tokens_that_came_together_share_a_chunk(tmp_path):
    """Whatever the chunks, their texts add up, and no character is split."""
    raw = "añb漢".encode() * 5

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=lambda submit, branch, position: raw[position])).free_run = True
            answer = await one.client.post(
                "/v1/completions", json={"prompt": "x", "max_tokens": len(raw), "stream": True}
            )
            assert "".join(f["choices"][0]["text"] for f in frames(answer.text)) == raw.decode()

    run(scenario())


def test_a_model_without_a_tokenizer_streams_token_ids(tmp_path):
    facts = ModelFacts(str(tmp_path), "dummy", "llama", {}, [], 0, 0, None, None, [], False, False)
    plan = msgspec.structs.replace(make_plan(), model=facts, vocab_size=1000)

    async def scenario():
        async with stack(tmp_path, engine=False, plan=plan) as one:
            engine = await one.up(token=lambda submit, branch, position: 500 + position)
            engine.free_run = True
            body = {"prompt": [17, 4, 99], "max_tokens": 20, "stream": True, "ignore_eos": True}
            chunks = sdk_stream((await one.client.post("/v1/completions", json=body)).text)
            texts = [choice["text"] for chunk in chunks for choice in chunk["choices"]]
            assert "".join(texts) == "".join(f" {500 + position}" for position in range(20))
            body = {"prompt": "17 4 99", "max_tokens": 2, "echo": True}
            answer = await one.client.post("/v1/completions", json=body)
            assert answer.json()["choices"][0]["text"] == "17 4 99 500 501"
            assert [submit.prompt_ids for submit in engine.submits] == [[17, 4, 99]] * 2
            for route, body, words in [
                ("/v1/chat/completions", {"messages": HI}, "no chat template"),
                ("/v1/completions", {"prompt": "17 four"}, "'four'"),
                ("/v1/completions", {"prompt": [1000]}, "1000"),
            ]:
                refused = await one.client.post(route, json=body)
                assert refused.status_code == 400
                assert words in refused.json()["error"]["message"]

    run(scenario())
