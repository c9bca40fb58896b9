"""Tools for a model whose chat template has none: they are told in a system message, in the format of Hermes 2 Pro,
which many models have seen; calls and results become texts of ordinary messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_INTRODUCTION = (
    "You can call functions. Their signatures are, one JSON object a line:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and its arguments as a JSON object within <tool_call></tool_call>, and nothing else:\n"
    '<tool_call>\n{{"name": <function name>, "arguments": <arguments object>}}\n</tool_call>\n'
    "The result comes within <tool_response></tool_response>. Call a function only where that helps; otherwise answer."
)


def described(
    turns: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]], *, takes_system: bool
) -> list[dict[str, Any]]:
    """`turns` as messages of roles that any template knows. Without a system role the first user is told.
    `tools` as OpenAI has them."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role = turn["role"]
        if role == "assistant" and turn.get("tool_calls"):
            calls = "\n".join(_call(call) for call in turn["tool_calls"])
            text = _text(turn.get("content"))
            messages.append({"role": "assistant", "content": f"{text}\n{calls}" if text else calls})
        elif role == "tool":
            result = f"<tool_response>\n{_text(turn.get('content'))}\n</tool_response>"
            if messages and messages[-1].get("results"):  # results of one answer are one message
                messages[-1]["content"] += f"\n{result}"
            else:
                messages.append({"role": "user", "content": result, "results": True})
        else:
            messages.append(dict(turn))
    for message in messages:
        message.pop("results", None)
    return _introduced(messages, tools, takes_system) if tools else messages


def _introduced(
    messages: list[dict[str, Any]], tools: Sequence[dict[str, Any]], takes_system: bool
) -> list[dict[str, Any]]:
    lines = "\n".join(json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools)
    told = _INTRODUCTION.format(tools=lines)
    roles = ("system", "developer") if takes_system else ("user",)
    if messages and messages[0]["role"] in roles:
        text = _text(messages[0].get("content"))
        joined = f"{text}\n\n{told}" if takes_system else f"{told}\n\n{text}"
        return [messages[0] | {"content": joined if text else told}, *messages[1:]]
    return [{"role": roles[0], "content": told}, *messages]


def _call(call: dict[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}\n</tool_call>'


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content or ""
