"""The clients of Text Generation Inference, unchanged, against the embedded model: every parameter, streamed and not.

The daemon begins with LightLLM's own routes and is reloaded to TGI's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import ValidationError

from clients import environments
from clients.environments import HEAVY
from closed_loop import ctl
from config_file import Settings
from harness import Daemon
from long_run import LONG

NEEDS_CLIENT = pytest.mark.skipif(
    importlib.util.find_spec("text_generation") is None or importlib.util.find_spec("aiohttp") is None,
    reason="pip install --no-deps text-generation==0.7.0; pip install '.[clients]'",
)
PROMPT = "The three largest planets are"
PROMPT_TOKENS = 5
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}, "required": ["n"]}
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def daemon(demo: Daemon, settings: Settings) -> Iterator[Daemon]:
    own = httpx.post(f"{demo.url}/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 1}})
    assert own.json()["count_output_tokens"] == 1
    assert httpx.get(f"{demo.url}/info").status_code == 404
    generation = demo.status()["generation"]
    settings.write({"use_tgi_api": True})
    done = ctl(demo, "reload")
    assert done.code == 0, done
    assert httpx.get(f"{demo.url}/info").json()["model_dtype"] == "torch.float32"
    assert demo.status()["generation"] == generation  # the engine did not notice
    yield demo
    settings.write({})
    assert ctl(demo, "reload").code == 0


class Case(NamedTuple):
    """One row of the matrix."""

    parameters: dict[str, Any]  # by the names of the API
    check: Callable[[Any], bool] = lambda answer: True
    repeats: bool = True  # the same request has the same answer
    streams: bool = True


def reason(answer: Any) -> str:
    """A string, or an enumeration that is one."""
    finish = answer.details.finish_reason
    return str(getattr(finish, "value", finish))


CASES = {
    "nothing": Case({}, lambda answer: reason(answer) == "length" and answer.details.seed is None),
    "do_sample": Case({"do_sample": True}, lambda answer: answer.details.seed is not None, repeats=False),
    "seed": Case({"do_sample": True, "seed": 5}, lambda answer: answer.details.seed == 5),
    "temperature": Case({"temperature": 0.7, "seed": 5}),
    "top_k": Case({"top_k": 1, "seed": 5}, lambda answer: answer.generated_text == GREEDY[0]),
    "top_p": Case({"top_p": 0.5, "seed": 5}),
    "typical_p": Case({"typical_p": 0.5, "seed": 5}),
    "repetition_penalty": Case({"repetition_penalty": 3.0}, lambda answer: answer.generated_text != GREEDY[0]),
    "frequency_penalty": Case({"frequency_penalty": 2.0}),
    "return_full_text": Case({"return_full_text": True}, lambda answer: answer.generated_text == PROMPT + GREEDY[0]),
    "stop": Case(
        {"stop": ["never said", "Saturn"], "max_new_tokens": 12},
        lambda answer: answer.generated_text.endswith("Saturn") and reason(answer) == "stop_sequence",
    ),
    "truncate": Case({"truncate": 2, "decoder_input_details": True}, lambda answer: len(answer.details.prefill) == 2),
    "truncate, streamed": Case({"truncate": 2}),
    "decoder_input_details": Case(
        {"decoder_input_details": True},
        lambda answer: (
            "".join(token.text for token in answer.details.prefill) == PROMPT
            and answer.details.prefill[0].logprob is None
            and all(token.logprob < 0 for token in answer.details.prefill[1:])
        ),
        streams=False,
    ),
    "top_n_tokens": Case(
        {"top_n_tokens": 3},
        lambda answer: (
            [len(tokens) for tokens in answer.details.top_tokens] == [3] * 4
            and [tokens[0].id for tokens in answer.details.top_tokens] == [token.id for token in answer.details.tokens]
        ),
    ),
    "best_of": Case(
        {"best_of": 3, "do_sample": True},
        lambda answer: (
            len(answer.details.best_of_sequences) == 2
            and all(mean(other) <= mean(answer.details) for other in answer.details.best_of_sequences)
        ),
        repeats=False,
        streams=False,
    ),
    "max_new_tokens": Case({"max_new_tokens": 1}, lambda answer: answer.details.generated_tokens == 1),
    "watermark": Case({"watermark": False}),
    "grammar, a pattern": Case(
        {"grammar": {"type": "regex", "value": " [A-Z][a-z]{2,9}\\."}, "max_new_tokens": 12},
        lambda answer: re.fullmatch(" [A-Z][a-z]{2,9}\\.", answer.generated_text) and reason(answer) == "eos_token",
    ),
    "grammar, a schema": Case(
        {"grammar": {"type": "json", "value": SCHEMA}, "max_new_tokens": 20},
        lambda answer: 1 <= json.loads(answer.generated_text)["n"] <= 9,
    ),
}
CASES["truncate"] = CASES["truncate"]._replace(streams=False)
GREEDY: list[str] = []  # the text without any parameter


def mean(told: Any) -> float:
    return sum(token.logprob for token in told.tokens) / len(told.tokens)


def spelled(tokens: list[Any]) -> str:
    return "".join(token.text for token in tokens if not token.special)


class SameToken(NamedTuple):
    """One kind in place of several of huggingface_hub's, which leaves some as objects of JSON."""

    id: int
    text: str
    logprob: float
    special: bool


def same(token: Any) -> SameToken:
    return SameToken(**(token if isinstance(token, dict) else vars(token)))


Whole = Callable[..., Any]
Streamed = Callable[..., list[Any]]


def walk(whole: Whole, streamed: Streamed) -> None:
    """Every case; a stream tells the same tokens as the answer in one piece, and the same end."""
    for name, case in CASES.items():
        parameters = {"max_new_tokens": 4} | case.parameters
        answer = whole(**parameters)
        if name == "nothing":
            GREEDY[:] = [answer.generated_text]
        before = PROMPT if parameters.get("return_full_text") else ""
        assert answer.generated_text == before + spelled(answer.details.tokens), name
        assert answer.details.generated_tokens == len(answer.details.tokens), name
        assert case.check(answer), (name, answer)
        if not case.streams:
            continue
        events = streamed(**parameters)
        assert events[-1].generated_text == before + spelled([event.token for event in events]), name
        assert events[-1].details.generated_tokens == len(events), name
        if case.repeats:
            assert [event.token for event in events] == answer.details.tokens, name
            assert events[-1].generated_text == answer.generated_text, name
            assert events[-1].details.finish_reason == answer.details.finish_reason, name
            assert events[-1].details.seed == answer.details.seed, name
        if parameters.get("top_n_tokens"):
            assert [event.top_tokens for event in events] == answer.details.top_tokens


@HEAVY
def test_text_generation_in_an_environment_of_its_own(daemon: Daemon) -> None:
    interpreter = environments.python("text-generation==0.7.0")
    environments.run(interpreter, Path(__file__).parent / "programs" / "text_generation_client.py", BASE=daemon.url)


def test_every_parameter_by_huggingface_hub(daemon: Daemon) -> None:
    client = InferenceClient(daemon.url)

    def whole(**parameters: Any) -> Any:
        answer = client.text_generation(PROMPT, details=True, **parameters)
        answer.details.tokens = [same(token) for token in answer.details.tokens]
        answer.details.top_tokens = [[same(one) for one in tokens] for tokens in answer.details.top_tokens or []]
        return answer

    def streamed(**parameters: Any) -> list[Any]:
        events = list(client.text_generation(PROMPT, details=True, stream=True, **parameters))
        for index, event in enumerate(events, 1):
            assert event.index == index
            event.token = same(event.token)
            event.top_tokens = [same(one) for one in event.top_tokens or []]
        truncated = parameters.get("truncate")
        assert events[-1].details.input_length == (truncated or PROMPT_TOKENS)
        return events

    walk(whole, streamed)
    assert client.text_generation(PROMPT, max_new_tokens=4) == GREEDY[0]
    assert "".join(client.text_generation(PROMPT, max_new_tokens=4, stream=True)) == GREEDY[0]


def test_huggingface_hub_gets_its_own_exceptions_health_and_info(daemon: Daemon) -> None:
    client = InferenceClient(daemon.url)
    for stream in (False, True):
        with pytest.raises(ValidationError, match="max_new_tokens"):
            list(client.text_generation(PROMPT, max_new_tokens=10_000, stream=stream))
        with pytest.raises(ValidationError, match="watermark"):
            list(client.text_generation(PROMPT, watermark=True, stream=stream))
    client = InferenceClient(daemon.url, provider="hf-inference")
    assert client.health_check()
    assert client.get_endpoint_info()["max_total_tokens"] == 3072


def test_chat_by_huggingface_hub(daemon: Daemon) -> None:
    client = InferenceClient(daemon.url)
    asked: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "logprobs": True, "top_logprobs": 2}
    answer = client.chat_completion(MESSAGES, **asked)
    assert "Paris" in answer.choices[0].message.content
    assert answer.system_fingerprint
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content)
    chunks = list(client.chat_completion(MESSAGES, stream=True, **asked))
    told = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert told == answer.choices[0].message.content
    assert {chunk.system_fingerprint for chunk in chunks} == {answer.system_fingerprint}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    answer = client.chat_completion(MESSAGES, max_tokens=20, response_format=form)  # type: ignore[arg-type]
    assert 1 <= json.loads(answer.choices[0].message.content)["n"] <= 9


def test_the_async_client_of_huggingface_hub(daemon: Daemon) -> None:
    async def scenario() -> None:
        client = AsyncInferenceClient(daemon.url)
        answer = await client.text_generation(PROMPT, details=True, max_new_tokens=4)
        stream = await client.text_generation(PROMPT, details=True, stream=True, max_new_tokens=4)
        assert "".join([event.token.text async for event in stream]) == answer.generated_text

    asyncio.run(scenario())


@pytest.mark.skipif(not LONG, reason="a scripted engine dies in test_tgi_streams.py")
def test_a_killed_engine_loses_no_event(daemon: Daemon) -> None:
    client = InferenceClient(daemon.url, timeout=120)
    asked: dict[str, Any] = {"details": True, "stream": True, "max_new_tokens": 40, "temperature": 0.8, "seed": 3}
    undisturbed = list(client.text_generation(PROMPT, **asked))
    events = []
    for event in client.text_generation(PROMPT, **asked):
        events.append(event)
        if len(events) in (5, 20):
            daemon.kill("engine")
    assert [event.index for event in events] == list(range(1, len(undisturbed) + 1))
    assert [event.token.text for event in events] == [event.token.text for event in undisturbed]
    assert events[-1].details == undisturbed[-1].details
    assert daemon.status()["generation"] > 1


def renamed(parameters: dict[str, Any]) -> dict[str, Any]:
    """As `text-generation` names them."""
    return {"stop_sequences" if name == "stop" else name: value for name, value in parameters.items()}


@NEEDS_CLIENT
def test_every_parameter_by_text_generation(daemon: Daemon) -> None:
    from text_generation import Client

    client = Client(daemon.url)
    walk(
        lambda **parameters: client.generate(PROMPT, **renamed(parameters)),
        lambda **parameters: list(client.generate_stream(PROMPT, **renamed(parameters))),
    )


@NEEDS_CLIENT
def test_what_the_tests_of_text_generation_ask_for(daemon: Daemon) -> None:
    """Those of its repository, of its client and of its asynchronous one."""
    from text_generation import AsyncClient, Client
    from text_generation.errors import NotFoundError
    from text_generation.errors import ValidationError as Invalid
    from text_generation.types import FinishReason

    async def whole(url: str, **parameters: Any) -> Any:
        return await AsyncClient(url).generate(PROMPT, **parameters)

    async def streamed(url: str, **parameters: Any) -> list[Any]:
        return [event async for event in AsyncClient(url).generate_stream(PROMPT, **parameters)]

    for generate, stream in (
        (
            lambda url, **parameters: Client(url).generate(PROMPT, **parameters),
            lambda url, **parameters: list(Client(url).generate_stream(PROMPT, **parameters)),
        ),
        (
            lambda url, **parameters: asyncio.run(whole(url, **parameters)),
            lambda url, **parameters: asyncio.run(streamed(url, **parameters)),
        ),
    ):
        answer = generate(daemon.url, max_new_tokens=1, decoder_input_details=True)
        assert answer.details.finish_reason == FinishReason.Length
        assert (answer.details.generated_tokens, answer.details.seed) == (1, None)
        assert (len(answer.details.prefill), len(answer.details.tokens)) == (PROMPT_TOKENS, 1)
        (event,) = stream(daemon.url, max_new_tokens=1)
        assert event.generated_text == answer.generated_text
        assert event.details.finish_reason == FinishReason.Length
        assert (event.details.generated_tokens, event.details.seed) == (1, None)
        for ask in (generate, stream):
            with pytest.raises(NotFoundError):
                ask(f"{daemon.url}/fake/model")
            with pytest.raises(Invalid):
                ask(daemon.url, max_new_tokens=10_000)


@NEEDS_CLIENT
def test_chat_by_text_generation(daemon: Daemon) -> None:
    from text_generation import Client
    from text_generation.types import Message

    client = Client(daemon.url)
    messages = [Message(**message) for message in MESSAGES]
    answer = client.chat(messages, max_tokens=8, seed=1, temperature=0.01)
    assert "Paris" in answer.choices[0].message.content
    assert answer.system_fingerprint
    chunks = list(client.chat(messages, max_tokens=8, seed=1, temperature=0.01, stream=True))
    told = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert told == answer.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


def test_openai_s_routes_are_beside_them(daemon: Daemon) -> None:
    asked = {"model": "any", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    answer = httpx.post(f"{daemon.url}/v1/completions", json=asked, timeout=60).json()
    assert answer["choices"][0]["text"]
    assert answer["system_fingerprint"]
    streamed = httpx.post(f"{daemon.url}/v1/completions", json=asked | {"stream": True}, timeout=60).text
    assert streamed.endswith("data: [DONE]\n\n")
    refused = httpx.post(f"{daemon.url}/v1/completions", json={}, timeout=60)
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
