"""The object that a response is, and its events in a stream."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import msgspec

from lightllmd.api.dialects.responses.bodies import ResponsesBody, SchemaFormat
from lightllmd.api.dialects.responses.items import Item
from lightllmd.api.dialects.responses.output import StreamEvent
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.web.responses import json_in_parts
from lightllmd.errors import LightllmdError, QueueFull

_json = msgspec.json.Encoder()


def usage(entry: Entry, reasoning: int) -> dict[str, Any]:
    """`reasoning`: tokens of the answer that are no content."""
    return {
        "input_tokens": entry.prompt_tokens,
        "input_tokens_details": {"cached_tokens": entry.cached, "cache_write_tokens": 0},
        "output_tokens": entry.generated,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": entry.prompt_tokens + entry.generated,
    }


def failure(error: LightllmdError) -> dict[str, Any]:
    """The `error` of a response that failed."""
    code = "rate_limit_exceeded" if isinstance(error, QueueFull) else "server_error"
    return {"code": code, "message": error.message}


class ResponseShape:
    """Of one response. What of it the request alone decides is encoded once: instructions and tools may be large, and a
    stream tells them three times."""

    def __init__(self, response_id: str, model: str, body: ResponsesBody) -> None:
        """Encodes; call it where that blocks no event loop."""
        self.id = response_id
        self._head = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
        }
        self._asked = _opened(json_in_parts(_echo(body)))

    def json(
        self,
        status: str,
        output: Iterable[Item] = (),
        told_usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> bytes:
        """The response, as it stands."""
        ended = {
            **self._head,
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": list(output),
            "usage": told_usage,
        }
        return b"%b,%b" % (json_in_parts(ended)[:-1], self._asked)


class EventWriter:
    """Frames of server-sent events, numbered."""

    def __init__(self) -> None:
        self._number = 0

    def frame(self, event: StreamEvent) -> bytes:
        """Of an event without its number, which it gets."""
        event["sequence_number"] = self._next()
        return self._framed(event["type"], _json.encode(event))

    def response(self, kind: str, response: bytes) -> bytes:
        """Of an event with the whole response, which is JSON."""
        data = b'{"type":"%b","sequence_number":%d,"response":%b}' % (kind.encode(), self._next(), response)
        return self._framed(kind, data)

    def error(self, error: LightllmdError) -> bytes:
        """Of what went wrong."""
        code, param = error.parameters.get("code"), error.parameters.get("param")
        told = {"code": code or failure(error)["code"], "message": error.message, "param": param}
        return self.frame({"type": "error"} | told)

    def _next(self) -> int:
        self._number += 1
        return self._number - 1

    @staticmethod
    def _framed(kind: str, data: bytes) -> bytes:
        return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)


def _opened(encoded: bytes) -> bytes:
    """An object without its first brace, to go behind other fields."""
    return encoded[1:]


def _echo(body: ResponsesBody) -> dict[str, Any]:
    """What a response tells of its request."""
    return {
        "background": False,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": body.reasoning.effort,
            "summary": body.reasoning.summary or body.reasoning.generate_summary,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.stored,
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": _format(body), **({"verbosity": v} if (v := body.text.verbosity) else {})},
        "tool_choice": _choice(body),
        "tools": [
            {
                "type": "function",
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.parameters,
                "strict": bool(tool.strict),
            }
            for tool in body.tools or ()
        ],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }


def _format(body: ResponsesBody) -> dict[str, Any]:
    given = body.text.format
    if not isinstance(given, SchemaFormat):
        return {"type": given.type}
    return {
        "type": given.type,
        "name": given.name,
        "description": given.description,
        "schema": given.schema_,
        "strict": bool(given.strict),
    }


def _choice(body: ResponsesBody) -> Any:
    choice = body.tool_choice
    if choice is None or isinstance(choice, str):
        return choice or "auto"
    return choice.model_dump()
