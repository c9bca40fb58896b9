"""What the tests of the Responses API say and hear: all that is heard is checked with the models of OpenAI's client."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import TypeAdapter

from api.frontend_harness import EOS, Stack
from lightllmd.ipc.messages import Submit

_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
_IDS = re.compile(r"\b(resp|msg|rs|fc|fco|call)_[0-9a-f]{24,32}\b")


def said(*texts: str):
    """For a scripted engine: the n-th request is answered with the n-th text, which then ends; the last one again."""
    order: dict[int, str] = {}

    def token(submit: Submit, branch: int, position: int) -> int:
        text = order.setdefault(submit.request, texts[min(len(order), len(texts) - 1)]).encode()
        return text[position] if position < len(text) else EOS

    return token


def checked(answer: httpx.Response) -> dict[str, Any]:
    """The response, which is one to OpenAI's client, too."""
    assert answer.status_code == 200, answer.text
    response = answer.json()
    _strictly(Response, response)
    return response


def checked_list(answer: httpx.Response) -> dict[str, Any]:
    """As `checked`, a list of items."""
    assert answer.status_code == 200, answer.text
    listed = answer.json()
    _strictly(ResponseItemList, listed)
    return listed


def events(raw: str) -> list[dict[str, Any]]:
    """Of a stream; their numbers, names and shapes are checked."""
    found = []
    for block in raw.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(found)
        known = type(_EVENT.validate_python(event)).model_fields.keys()
        assert event.keys() - known <= {"name"}  # of a call that is done: OpenAI's clients of 2025 know it
        if "response" in event:
            _strictly(Response, event["response"])
        found.append(event)
    return found


def told(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The response that the events of a stream add up to. Everything is said once, before the end repeats it."""
    items: list[dict[str, Any]] = []
    done: list[dict[str, Any]] = []
    for event in found[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items) == len(done)
            items.append(event["item"])
            continue
        item = items[-1]
        assert event["output_index"] == len(items) - 1
        if kind == "response.output_item.done":
            done.append(event["item"])
            assert item | {"status": event["item"]["status"]} == event["item"]
            continue
        assert event["item_id"] == item["id"]
        match kind:
            case "response.content_part.added":
                assert event["content_index"] == len(item["content"])
                item["content"].append(event["part"])
            case "response.reasoning_summary_part.added":
                assert event["summary_index"] == len(item["summary"])
                item["summary"].append(event["part"])
            case "response.output_text.delta":
                item["content"][-1]["text"] += event["delta"]
                item["content"][-1]["logprobs"] += event["logprobs"]
            case "response.reasoning_text.delta":
                item["content"][-1]["text"] += event["delta"]
            case "response.reasoning_summary_text.delta":
                item["summary"][-1]["text"] += event["delta"]
            case "response.function_call_arguments.delta":
                item["arguments"] += event["delta"]
            case "response.output_text.done" | "response.reasoning_text.done":
                assert item["content"][-1]["text"] == event["text"]
            case "response.reasoning_summary_text.done":
                assert item["summary"][-1]["text"] == event["text"]
            case "response.content_part.done":
                assert item["content"][-1] == event["part"]
            case "response.reasoning_summary_part.done":
                assert item["summary"][-1] == event["part"]
            case "response.function_call_arguments.done":
                assert item["arguments"] == event["arguments"]
            case _:
                raise AssertionError(kind)
    last = found[-1]["response"]
    assert last["output"] == done
    return last


def plain(value: Any) -> Any:
    """With what differs between two runs replaced: ids by their order, times by 0."""
    names: dict[str, str] = {}

    def named(match: re.Match[str]) -> str:
        return names.setdefault(match[0], f"{match[1]}_{len(names)}")

    text = _IDS.sub(named, json.dumps(value))
    return json.loads(re.sub(r'"(created_at|completed_at)": \d+', r'"\1": 0', text))


async def respond(one: Stack, **body: Any) -> dict[str, Any]:
    """In one piece."""
    return checked(await one.client.post("/v1/responses", json=body))


async def streamed(one: Stack, **body: Any) -> list[dict[str, Any]]:
    """The events."""
    answer = await one.client.post("/v1/responses", json=body | {"stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


def _strictly(model: type[Any], value: dict[str, Any]) -> None:
    """Nothing is missing; what is there beside the model's fields is ours."""
    model.model_validate(value, strict=True)
    known = {field.alias or name for name, field in model.model_fields.items()}
    assert value.keys() - known <= {"store"}
