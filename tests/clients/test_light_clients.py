"""Packages of OpenAI, Anthropic and Hugging Face, unchanged, against the demo model."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import jsonschema
import pytest

from harness import Daemon

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "inhabitants": {"type": "integer", "maximum": 99999999},
    },
    "required": ["city", "inhabitants"],
    "additionalProperties": False,
}


# --- anthropic ----------------------------------------------------------------------------------------------------


@pytest.fixture
def anthropic(demo: Daemon) -> Any:
    package = pytest.importorskip("anthropic", reason="pip install '.[clients]'")
    with package.Anthropic(base_url=demo.url, api_key="none", max_retries=0) as client:
        yield client


GREEDY = {"extra_body": {"temperature": 0}}
WEATHER = {
    "name": "get_weather",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}

ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}


def test_anthropic_messages(anthropic: Any) -> None:
    asked = {"model": "demo", "max_tokens": 8, "messages": QUESTION, "system": "Answer in one sentence.", **GREEDY}
    whole = anthropic.messages.create(**asked)
    (block,) = whole.content
    assert "Paris" in block.text
    with anthropic.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == block.text
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
    counted = anthropic.messages.count_tokens(model="demo", messages=QUESTION, system="Answer in one sentence.")
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    stopped = anthropic.messages.create(**asked, stop_sequences=["Paris"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "Paris")
    assert [model.id for model in anthropic.models.list()]


def test_anthropic_tools_round_trip(anthropic: Any) -> None:
    asked = {"model": "demo", "max_tokens": 60, "tools": [WEATHER], "tool_choice": ONE_CALL}
    conversation: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    whole = anthropic.messages.create(**asked, messages=conversation, **GREEDY)
    call = next(block for block in whole.content if block.type == "tool_use")
    assert (whole.stop_reason, call.name, [*call.input]) == ("tool_use", "get_weather", ["city"])
    with anthropic.messages.stream(**asked, messages=conversation, **GREEDY) as stream:
        streamed = stream.get_final_message()
    assert [(block.name, block.input) for block in streamed.content if block.type == "tool_use"] == [
        (block.name, block.input) for block in whole.content if block.type == "tool_use"
    ]
    conversation += [
        whole.to_param(),
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": block.id, "content": "22 degrees, sunny"}
                for block in whole.content
                if block.type == "tool_use"
            ],
        },
    ]
    answer = anthropic.messages.create(
        **asked | {"tool_choice": {"type": "none"}, "max_tokens": 4}, messages=conversation, **GREEDY
    )
    assert answer.content[0].type == "text"


def test_anthropic_structured_output(anthropic: Any) -> None:
    asked = {"model": "demo", "max_tokens": 60, "messages": QUESTION, **GREEDY}
    answer = anthropic.messages.create(**asked, output_config={"format": {"type": "json_schema", "schema": SCHEMA}})
    assert answer.stop_reason == "end_turn"
    jsonschema.validate(json.loads(answer.content[0].text), SCHEMA)


def test_anthropic_asynchronously(anthropic: Any, demo: Daemon) -> None:
    package = pytest.importorskip("anthropic")

    async def ask() -> list[str]:
        async with package.AsyncAnthropic(base_url=demo.url, api_key="none") as client:
            asked = {"model": "demo", "max_tokens": 3, "messages": QUESTION, **GREEDY}
            answers = await asyncio.gather(*(client.messages.create(**asked) for _ in range(4)))
            return [answer.content[0].text for answer in answers]

    assert len({*asyncio.run(ask())}) == 1


# --- openai -------------------------------------------------------------------------------------------------------


@pytest.fixture
def openai(demo: Daemon) -> Any:
    package = pytest.importorskip("openai", reason="pip install '.[clients]'")
    with package.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(openai: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": QUESTION, "temperature": 0, "max_completion_tokens": 8}
    whole = openai.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    chunks = [*openai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage
    with openai.chat.completions.stream(**asked) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == text
    several = openai.chat.completions.create(
        **asked | {"temperature": 1, "n": 2, "seed": 5, "max_completion_tokens": 2}
    )
    assert len(several.choices) == 2


def test_openai_completions(openai: Any) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "The capital of France is", "max_tokens": 4, "temperature": 0}
    whole = openai.completions.create(**asked, logprobs=2, echo=True)
    assert whole.choices[0].text.startswith("The capital of France is Paris")
    text = openai.completions.create(**asked).choices[0].text
    streamed = [chunk.choices[0].text for chunk in openai.completions.create(**asked, stream=True)]
    assert "".join(streamed) == text
    assert len(openai.completions.create(**asked | {"prompt": ["a", "b"], "max_tokens": 2}).choices) == 2


def test_openai_models(openai: Any) -> None:
    (model,) = openai.models.list()
    assert openai.models.retrieve(model.id) == model


def test_openai_tools_round_trip(openai: Any) -> None:
    function = {"name": "get_weather", "parameters": WEATHER["input_schema"], "strict": True}
    asked: dict[str, Any] = {
        "model": "demo",
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "temperature": 0,
        "max_completion_tokens": 80,
        "tools": [{"type": "function", "function": function}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    with openai.chat.completions.stream(**asked) as stream:
        stream.until_done()
        choice = stream.get_final_completion().choices[0]
    calls = choice.message.tool_calls
    assert (choice.finish_reason, [*json.loads(calls[0].function.arguments)]) == ("tool_calls", ["city"])
    results = [{"role": "tool", "tool_call_id": call.id, "content": "22 degrees"} for call in calls]
    messages = [*asked["messages"], choice.message, *results]
    answer = openai.chat.completions.create(
        **asked | {"messages": messages, "tool_choice": "none", "max_completion_tokens": 4}
    )
    assert answer.choices[0].message.content


def test_openai_structured_output(openai: Any) -> None:
    import pydantic

    class City(pydantic.BaseModel):
        city: str = pydantic.Field(max_length=20)
        inhabitants: int = pydantic.Field(le=99999999)

    parsed = openai.chat.completions.parse(
        model="demo", messages=QUESTION, temperature=0, max_completion_tokens=60, response_format=City
    )
    assert isinstance(parsed.choices[0].message.parsed, City)


# --- huggingface_hub ----------------------------------------------------------------------------------------------


def test_huggingface_hub_chat(demo: Daemon) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="pip install '.[clients]'")
    client = hub.InferenceClient(base_url=f"{demo.url}/v1", api_key="none")
    asked: dict[str, Any] = {"messages": QUESTION, "temperature": 0.0, "max_tokens": 8}
    whole = client.chat_completion(**asked)
    assert "Paris" in whole.choices[0].message.content
    streamed = [chunk.choices[0].delta.content or "" for chunk in client.chat_completion(**asked, stream=True)]
    assert "".join(streamed) == whole.choices[0].message.content
