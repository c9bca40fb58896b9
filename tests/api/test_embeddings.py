"""/v1/embeddings answers as OpenAI's and vLLM's clients expect, beside generation, refusals included."""

from __future__ import annotations

import asyncio
import struct
from base64 import b64decode
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api.frontend_harness import EOS, expected, make_plan, run, stack
from fake_embeddings import SIZE, fake_embedding
from lightllmd.config.plan import Pooling, Scoring
from lightllmd.ipc.messages import PoolingParams

PATH = "/v1/embeddings"
KINDS = {
    "last": PoolingParams(unit=True),
    "mean": PoolingParams(mean=True, unit=True),
    "cls": PoolingParams([0], unit=True),
}


@asynccontextmanager
async def embedding(folder: Path, pooling: Pooling | None = None, **plan: Any):
    async with stack(folder, plan=make_plan(pooling=pooling, **plan)) as one:
        one.engine.labels = 0
        yield one


def posting(folder: Path, *bodies: dict[str, Any], pooling: Pooling | None = None, **plan: Any) -> list[httpx.Response]:
    async def scenario():
        async with embedding(folder, pooling, **plan) as one:
            return [await one.client.post(PATH, json=body) for body in bodies]

    return run(scenario())


def vectors(answer: httpx.Response) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    data = answer.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def near(text: str, params: PoolingParams = KINDS["last"]) -> Any:
    return pytest.approx(fake_embedding(list(text.encode()), params), abs=1e-6)


def test_the_answer_is_openais(tmp_path):
    [answer] = posting(tmp_path, {"model": "any", "input": "Hi", "user": "me", "encoding_format": None})
    (vector,) = vectors(answer)
    assert vector == near("Hi")
    assert answer.json() == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": vector}],
        "model": "fake-model",
        "usage": {"prompt_tokens": 2, "total_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}},
    }
    assert "x-lightllmd-ignored" not in answer.headers


def test_texts_and_token_ids_one_or_several(tmp_path):
    one, other = [72, 105], [72]
    answers = posting(tmp_path, *({"input": given} for given in ("Hi", ["Hi"], one, ["Hi", "H"], [one, other])))
    assert [[near("Hi")]] * 3 == [vectors(answer) for answer in answers[:3]]
    assert [[near("Hi"), near("H")]] * 2 == [vectors(answer) for answer in answers[3:]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_way_of_pooling_with_and_without_a_length_of_1(tmp_path, kind):
    raw = PoolingParams(KINDS[kind].at, mean=KINDS[kind].mean)
    bodies = [{"input": "text"}, {"input": "text", "use_activation": False}, {"input": "text", "normalize": False}]
    found = [vectors(answer)[0] for answer in posting(tmp_path, *bodies, pooling=Pooling(kind, unit=True))]
    assert found == [near("text", KINDS[kind]), near("text", raw), near("text", raw)]
    (own,) = posting(tmp_path, {"input": "text"}, pooling=Pooling(kind, unit=False))
    assert vectors(own) == [near("text", raw)]


def test_fewer_dimensions_have_the_length_1_again(tmp_path):
    short = PoolingParams(size=3, unit=True)
    for unit in (True, False):
        answers = posting(
            tmp_path,
            {"input": "text", "dimensions": 3},
            {"input": "text", "dimensions": SIZE},
            {"input": "text", "dimensions": SIZE + 1},
            {"input": "text", "dimensions": 0},
            pooling=Pooling("last", unit),
        )
        assert vectors(answers[0]) == [near("text", short)]
        assert vectors(answers[1]) == [near("text", PoolingParams(unit=unit))]
        beyond, none = (answer.json()["error"] for answer in answers[2:])
        assert beyond["param"] == none["param"] == "dimensions"
        assert beyond["message"].startswith(f"dimensions: should be at most {SIZE}, ")
        assert "got 9" in beyond["message"]
        assert "greater than or equal to 1" in none["message"]


def test_base64_is_little_endian_fp32_or_what_is_asked_for(tmp_path):
    plain, told, half, big = posting(
        tmp_path,
        *({"input": "Hi"} | more for more in ({}, {"encoding_format": "base64"})),
        {"input": "Hi", "encoding_format": "base64", "embed_dtype": "float16"},
        {"input": "Hi", "encoding_format": "base64", "endianness": "big"},
    )
    ((values,), (text,), (short,), (turned,)) = map(vectors, (plain, told, half, big))
    assert list(struct.unpack(f"<{SIZE}f", b64decode(text))) == values
    assert list(struct.unpack(f">{SIZE}f", b64decode(turned))) == values
    assert struct.unpack(f"<{SIZE}e", b64decode(short)) == pytest.approx(values, abs=1e-3)


def test_openais_client_gets_numbers(tmp_path):
    async def scenario():
        async with embedding(tmp_path) as one:
            client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{one.port}/v1", api_key="none")
            async with client:
                return await client.embeddings.create(model="any", input=["Hi", "H"], dimensions=4)

    made = run(scenario())
    short = PoolingParams(size=4, unit=True)
    assert [one.embedding for one in made.data] == [near("Hi", short), near("H", short)]
    assert made.usage.total_tokens == 3


def test_what_is_cut_keeps_the_token_that_ends_it(tmp_path):
    """As transformers cuts: an end that the tokenizer put there stays."""
    ended = [1, 2, 3, 4, EOS]

    async def scenario():
        async with embedding(tmp_path) as one:
            for more in (
                {"truncate_prompt_tokens": 3},
                {"truncate_prompt_tokens": 3, "truncation_side": "left"},
                {"truncate_prompt_tokens": -1},
            ):
                assert (await one.client.post(PATH, json={"input": ended} | more)).status_code == 200
            return [submit.prompt_ids for submit in one.engine.submits]

    assert run(scenario()) == [[1, 2, EOS], [3, 4, EOS], ended]


def test_a_conversation_is_embedded_as_its_template_writes_it(tmp_path):
    messages = [{"role": "user", "content": "hello"}]

    async def scenario():
        async with embedding(tmp_path) as one:
            bodies = ({"messages": messages}, {"messages": messages, "input": "x"}, {"model": "any"})
            answers = [await one.client.post(PATH, json=body) for body in bodies]
            return answers, [bytes(submit.prompt_ids).decode() for submit in one.engine.submits]

    (chat, both, neither), [prompt] = run(scenario())
    assert "hello" in prompt
    assert prompt != "hello"
    assert vectors(chat) == [near(prompt)]
    assert "not both" in both.json()["error"]["message"]
    assert neither.status_code == 400


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": ""}, "input: the prompt has no tokens"),
        ({"input": []}, "input: "),
        ({"input": ["a", ""]}, "input.1: the prompt has no tokens"),
        ({"input": [1, 999]}, "input: token id 999 is not within 0 .. 256"),
        ({"input": "x" * 3000}, "context_length_exceeded"),
        ({"input": {"a": 1}}, "input: "),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format: should be 'float' or 'base64'; got 'hex'"),
    ],
)
def test_what_is_wrong_is_refused_by_name(tmp_path, body, words):
    [answer] = posting(tmp_path, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"
    assert error["param"].startswith("input") or error["param"] == "encoding_format"


def test_a_reward_model_refuses_and_one_that_generates_does_both(tmp_path):
    async def asked(**plan: Any):
        async with stack(tmp_path, plan=make_plan(**plan)) as one:
            one.engine.labels = 0
            embedded = await one.client.post(PATH, json={"input": "Hi"})
            generated = await one.client.post(
                "/v1/completions", json={"prompt": "Hi", "max_tokens": 2, "temperature": 0}
            )
            return embedded, generated

    embedded, generated = run(asked(scoring=Scoring(["LABEL_0"])))
    assert embedded.status_code == 400
    assert embedded.json()["error"]["code"] == "reward_model"
    assert "use_reward_model" in embedded.json()["error"]["message"]
    embedded, generated = run(asked())
    assert vectors(embedded) == [near("Hi")]
    assert generated.json()["choices"][0]["text"] == expected("Hi", 2)


def test_a_killed_engine_costs_no_embedding(tmp_path):
    async def scenario():
        async with stack(tmp_path, plan=make_plan()) as one:
            one.engine.free_run = False
            asked = asyncio.create_task(one.client.post(PATH, json={"input": ["Hi", "H"]}))
            await one.engine.submitted(2)
            await one.kill()
            engine = await one.up()
            engine.labels, engine.free_run = 0, True
            return await asked, [submit.replay for submit in engine.submits]

    answer, replayed = run(scenario())
    assert vectors(answer) == [near("Hi"), near("H")]
    assert replayed == [True, True]
