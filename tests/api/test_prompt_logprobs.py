"""Log-probabilities of the prompt reach the answer whole, once, and in each dialect's own shape."""

from __future__ import annotations

import asyncio

import pytest

from api.frontend_harness import expected, frames, run, stack
from ledger_bench import Bench
from lightllmd.api.inflight.entry import Entry
from lightllmd.errors import RequestFailed
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE, PromptLogprobs, StepOutput
from lightllmd.requests.prompt_log import PromptLog

ALL = {"return_all_prompt_logprobs": True}
HI = [{"role": "user", "content": "hi"}]


def say(bench: Bench, entry: Entry, tokens: list[int], prompts: list[PromptLogprobs], cached: int = 0) -> None:
    """One step's output: tokens of branch 0, from the next position on, and what goes with them."""
    count, at = len(tokens), len(entry.branches[0].ids)
    bench.link.inbox.append(
        StepOutput(
            bench.generation,
            [entry.request] * count,
            [0] * count,
            [at + index for index in range(count)],
            tokens,
            [-1.0] * count,
            [FINISH_NONE] * count,
            cached=[(entry.request, cached)] if cached else [],
            prompts=prompts,
        )
    )
    bench.ledger.receive()


def parts(entry: Entry, size: int) -> list[PromptLogprobs]:
    return [
        PromptLogprobs(entry.request, first, [-float(index) for index in range(first, min(8, first + size))], None)
        for first in range(1, 8, size)
    ]


# --- the ledger -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("told", [0, 1, 2])
@pytest.mark.parametrize("size", [2, 3, 7])
def test_parts_of_two_engines_make_one_whole(told: int, size: int) -> None:
    """The second one tells all again, in parts of its own."""
    bench = Bench()
    bench.up()
    entry = bench.open(b"12345678", prompt_logprobs=0)
    say(bench, entry, [], parts(entry, 2)[:told])
    bench.down()
    bench.up()
    for part in parts(entry, size)[:-1]:
        say(bench, entry, [], [part])
    say(bench, entry, [65], parts(entry, size)[-1:])
    assert entry.error is None
    assert entry.prompt_log.logprobs == [-float(index) for index in range(1, 8)]
    bench.down()
    bench.up()
    say(bench, entry, [66], parts(entry, 3))  # of an engine that goes on
    assert entry.prompt_log.logprobs == [-float(index) for index in range(1, 8)]


def test_a_request_whose_prompt_is_told_with_a_gap_fails_instead_of_lying() -> None:
    bench = Bench()
    bench.up()
    gap, late, other = (bench.open(b"12345678", prompt_logprobs=0) for _ in range(3))
    say(bench, gap, [], parts(gap, 2)[1:])
    assert isinstance(gap.error, RequestFailed)
    say(bench, late, [65], parts(late, 3)[:1])  # the first token without the rest
    assert isinstance(late.error, RequestFailed)
    say(bench, other, [65], parts(other, 3))
    assert other.error is None


def test_alternatives_stay_beside_their_tokens_however_parts_overlap() -> None:
    log = PromptLog()
    assert log.take(PromptLogprobs(1, 1, [-1.0, -2.0], [[(7, -0.1)], [(8, -0.2)]]))
    assert log.take(PromptLogprobs(1, 2, [-2.0, -3.0], [[(8, -0.2)], [(9, -0.3)]]))
    assert log.take(PromptLogprobs(1, 1, [-1.0], [[(7, -0.1)]]))
    assert not log.take(PromptLogprobs(1, 5, [-5.0], [[(9, -0.3)]]))
    assert log.pairs([5, 6, 8, 4]) == [
        (5, {"6": -1.0, "7": -0.1}),
        (6, {"8": -2.0}),
        (8, {"4": -3.0, "9": -0.3}),
    ]


def test_cached_tokens_are_those_of_the_engine_that_gave_the_first_token() -> None:
    bench = Bench()
    bench.up()
    entry, cold = bench.open(b"12345678"), bench.open(b"12345678")
    say(bench, entry, [65], [], cached=5)
    say(bench, cold, [65], [])
    bench.down()
    bench.up()
    say(bench, entry, [66], [], cached=7)
    say(bench, cold, [66], [], cached=7)
    assert (entry.cached, cold.cached) == (5, 0)


def test_several_tokens_of_one_branch_in_one_message_are_taken_in_order() -> None:
    bench = Bench()
    bench.up()
    entry, stopped = bench.open(b"p"), bench.open(b"p", stop=["BC"])
    say(bench, entry, [65, 66, 67], [])
    assert (entry.branches[0].ids, entry.branches[0].text) == ([65, 66, 67], "ABC")
    bench.say((entry, 0, 3, 68, FINISH_NONE), (stopped, 0, 0, 65, FINISH_NONE), (entry, 0, 4, 69, FINISH_LENGTH))
    assert (entry.branches[0].text, entry.outcome) == ("ABCDE", "ok")
    say(bench, stopped, [66, 67, 68, 69], [])
    assert (stopped.branches[0].text, stopped.branches[0].finish, stopped.outcome) == ("ABC", "stop", "ok")


# --- LightLLM's routes ----------------------------------------------------------------------------------------------


def test_native_answers_have_the_documented_pairs_where_the_server_tells_all(tmp_path):
    async def scenario():
        async with stack(tmp_path, ALL) as one:
            body = (await one.generate("abcde", max_new_tokens=2)).json()
            assert body["prompt_token_ids"] == list(b"abcde")
            assert body["prompt_logprobs"] == [
                [97, {"98": -0.125}],
                [98, {"99": -0.25}],
                [99, {"100": -0.375}],
                [100, {"101": -0.5}],
            ]
            one_token = (await one.generate("a", max_new_tokens=2)).json()
            assert (one_token["prompt_token_ids"], one_token["prompt_logprobs"]) == ([97], [])
            several = (await one.generate("ab", max_new_tokens=2, n=2)).json()
            assert several["prompt_logprobs"] == [[97, {"98": -0.125}]]
            more = (await one.generate("ab", max_new_tokens=2, prompt_logprobs=2)).json()
            assert more["prompt_logprobs"] == [[97, {"98": -0.125, "65": -1.0, "66": -2.0}]]

    run(scenario())


def test_a_native_request_asks_for_them_alone(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = (await one.generate("ab", max_new_tokens=2, prompt_logprobs=0)).json()
            assert body["prompt_logprobs"] == [[97, {"98": -0.125}]]
            plain = (await one.generate("ab", max_new_tokens=2)).json()
            assert not {"prompt_logprobs", "prompt_token_ids"} & set(plain)
            assert one.engine.submits[-1].params.prompt_logprobs == -1

    run(scenario())


def test_a_stream_is_not_asked_for_what_its_frames_have_no_place_for(tmp_path):
    async def scenario():
        async with stack(tmp_path, ALL) as one:
            body = {"inputs": "abc", "parameters": {"max_new_tokens": 2}}
            got = frames((await one.client.post("/generate_stream", json=body)).text)
            assert len(got) == 2
            assert one.engine.submits[-1].params.prompt_logprobs == -1
            body["parameters"]["prompt_logprobs"] = 1
            refused = await one.client.post("/generate_stream", json=body)
            assert refused.status_code == 400
            assert "prompt_logprobs: a stream doesn't show them" in refused.json()["message"]
            chat = {"messages": HI, "max_tokens": 1, "stream": True}
            assert (await one.client.post("/v1/chat/completions", json=chat)).status_code == 200
            assert one.engine.submits[-1].params.prompt_logprobs == -1

    run(scenario())


def test_they_outlive_the_engine_that_told_them(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            answer = asyncio.create_task(one.generate("abcdefgh", max_new_tokens=3, prompt_logprobs=1))
            await engine.submitted(1)
            engine.step()
            await one.token()
            await one.kill()
            engine = await one.up()
            engine.free_run = True
            body = (await answer).json()
            assert body["generated_text"] == [expected("abcdefgh", 3)]
            assert [next(iter(pair[1])) for pair in body["prompt_logprobs"]] == [str(byte) for byte in b"bcdefgh"]
            assert [next(iter(pair[1].values())) for pair in body["prompt_logprobs"]] == [-i / 8 for i in range(1, 8)]

    run(scenario())


# --- OpenAI's routes ------------------------------------------------------------------------------------------------


def test_openai_answers_have_vllms_shape(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": ["ab", "cA"], "max_tokens": 2, "prompt_logprobs": 2}
            first, second = (await one.client.post("/v1/completions", json=body)).json()["choices"]
            assert first["prompt_logprobs"] == [
                None,
                {
                    "98": {"logprob": -0.125, "rank": None, "decoded_token": "b"},
                    "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"},
                    "66": {"logprob": -2.0, "rank": 2, "decoded_token": "B"},
                },
            ]
            assert next(iter(second["prompt_logprobs"][1].items())) == (
                "65",
                {"logprob": -0.125, "rank": 1, "decoded_token": "A"},
            )
            chat = {"messages": HI, "max_tokens": 1, "prompt_logprobs": 0}
            answer = (await one.client.post("/v1/chat/completions", json=chat)).json()
            assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
            assert answer["prompt_logprobs"][0] is None
            plain = (await one.client.post("/v1/chat/completions", json={"messages": HI, "max_tokens": 1})).json()
            assert "prompt_logprobs" not in plain

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_with_logprobs_scores_the_prompt_too(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": "aéb", "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1, "stream": stream}
            answer = await one.client.post("/v1/completions", json=body)
            choices = [f["choices"][0] for f in frames(answer.text)] if stream else answer.json()["choices"]
            text = expected("aéb", 2)
            assert "".join(choice["text"] for choice in choices) == "aéb" + text
            merged = {
                key: [value for choice in choices for value in choice["logprobs"][key]]
                for key in choices[0]["logprobs"]
            }
            assert merged["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "b", *text]
            assert merged["token_logprobs"] == [None, -0.125, -0.25, -0.375, -0.5, -0.5]
            own = list(zip(merged["tokens"], merged["token_logprobs"], strict=True))
            assert merged["top_logprobs"] == [
                None,
                *({"A": -1.0, token: value} for token, value in own[1:4]),
                *({token: value} for token, value in own[4:]),
            ]
            assert merged["text_offset"] == [0, 1, 1, 2, 3, 4]
            assert "prompt_logprobs" not in choices[0]
            without = (await one.client.post("/v1/completions", json=body | {"echo": False, "stream": False})).json()
            assert without["choices"][0]["logprobs"]["text_offset"] == [3, 4]

    run(scenario())


def test_an_echo_of_token_ids_repeats_their_text(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": [97, 256, 98], "max_tokens": 1, "echo": True, "logprobs": 0, "n": 2}
            choices = (await one.client.post("/v1/completions", json=body)).json()["choices"]
            for choice in choices:
                assert choice["text"].startswith("a<eos>b")
                assert choice["logprobs"]["text_offset"] == [0, 1, 6, 7]
                tops = choice["logprobs"]["top_logprobs"]
                assert [top and list(top) for top in tops] == [None, *([t] for t in choice["logprobs"]["tokens"][1:])]

    run(scenario())


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_an_openai_stream_refuses_them_by_name(tmp_path, route):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": "x"} if route == "completions" else {"messages": HI}
            answer = await one.client.post(f"/v1/{route}", json=body | {"prompt_logprobs": 1, "stream": True})
            assert answer.status_code == 400
            assert "prompt_logprobs is for answers in one piece, not for streams; got 1" in answer.text

    run(scenario())


@pytest.mark.parametrize("more", [{}, {"stream": True}, {"n": 2}, {"best_of": 2}, {"min_tokens": 1}], ids=str)
def test_max_tokens_0_scores_the_prompt_and_generates_nothing(tmp_path, more):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": "abc", "max_tokens": 0, "echo": True, "logprobs": 2, "temperature": 0, **more}
            answer = await one.client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            choices = [piece for frame in frames(answer.text) for piece in frame["choices"]] if "stream" in more else []
            choices = choices or answer.json()["choices"]
            assert len(choices) == more.get("n", 1)
            for choice in choices:
                assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
                assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
                assert choice["logprobs"]["token_logprobs"] == [None, -0.125, -0.25]
                assert len(choice["logprobs"]["top_logprobs"][1]) == 3
                assert choice["logprobs"]["text_offset"] == [0, 1, 2]
            if "stream" not in more:
                usage = answer.json()["usage"]
                assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 0, 3)

    run(scenario())


def test_max_tokens_0_without_echo_answers_with_no_text(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            body = {"prompt": ["abc", "d"], "max_tokens": 0, "prompt_logprobs": 0}
            first, second = (await one.client.post("/v1/completions", json=body)).json()["choices"]
            assert (first["text"], first["finish_reason"], first["logprobs"]) == ("", "length", None)
            assert [next(iter(one.values()))["logprob"] for one in first["prompt_logprobs"][1:]] == [-0.125, -0.25]
            assert second["prompt_logprobs"] == [None]
            chat = {"messages": HI, "max_tokens": 0}
            assert (await one.client.post("/v1/chat/completions", json=chat)).status_code == 400
            native = await one.generate("abc", max_new_tokens=0)
            assert native.status_code == 400

    run(scenario())


def test_a_prompt_as_long_as_a_request_may_be_is_scored(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 50, "max_req_total_len": 51}) as one:
            body = {"prompt": [97] * 50, "max_tokens": 2, "echo": True, "logprobs": 0}
            assert (await one.client.post("/v1/completions", json=body)).status_code == 400
            answer = await one.client.post("/v1/completions", json=body | {"max_tokens": 0})
            assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == 50

    run(scenario())


def test_a_prompt_that_is_scored_alone_outlives_the_engine(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            body = {"prompt": "abcdefgh", "max_tokens": 0, "echo": True, "logprobs": 0, "n": 2}
            answer = asyncio.create_task(one.client.post("/v1/completions", json=body))
            await engine.submitted(1)
            await one.kill()
            engine = await one.up()
            engine.free_run = True
            for choice in (await answer).json()["choices"]:
                assert choice["logprobs"]["token_logprobs"][1:] == [-index / 8 for index in range(1, 8)]

    run(scenario())


# --- min_tokens beside the stops of a text --------------------------------------------------------------------------


def test_min_tokens_holds_back_stops_on_both_routes(tmp_path):
    text = expected("hi", 12)

    async def scenario():
        async with stack(tmp_path) as one:
            stop, least = text[0:2], 5
            later = text.find(stop, 5 - len(stop)) if stop in text[5 - len(stop) :] else None
            native = (await one.generate("hi", max_new_tokens=12, stop_sequences=[stop], min_new_tokens=least)).json()
            wanted = text if later is None else text[: later + 2]
            assert native["generated_text"] == [wanted]
            body = {"prompt": "hi", "max_tokens": 12, "stop": [stop], "min_tokens": least, "temperature": 0}
            answer = (await one.client.post("/v1/completions", json=body)).json()["choices"][0]
            assert answer["text"] == (text if later is None else text[:later])
            ids = {"prompt": "hi", "max_tokens": 12, "temperature": 0, "stop_token_ids": [ord(text[0]), ord(text[7])]}
            cut = (await one.client.post("/v1/completions", json=ids)).json()["choices"][0]["text"]
            longer = (await one.client.post("/v1/completions", json=ids | {"min_tokens": 2})).json()["choices"][0][
                "text"
            ]
            assert len(cut) < len(longer) <= 8

    run(scenario())
