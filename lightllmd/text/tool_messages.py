"""Calls and their results in messages, for chat templates that don't take them as clients send them.

For a template that has no tools at all they are told in a system message, in the format of Hermes 2 Pro, which many
models have seen; calls and results become texts of ordinary messages.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

Message = dict[str, Any]

_INTRODUCTION = (
    "You can call functions. Their signatures are, one JSON object a line:\n<tools>\n{tools}\n</tools>\n"
    "To call one, write its name and its arguments as a JSON object within <tool_call></tool_call>, and nothing else:\n"
    '<tool_call>\n{{"name": <function name>, "arguments": <arguments object>}}\n</tool_call>\n'
    "The result comes within <tool_response></tool_response>. Call a function only where that helps; otherwise answer."
)


def described(turns: Sequence[Message], tools: Sequence[Message], *, takes_system: bool) -> list[Message]:
    """`turns` as messages of roles that any template knows. Without a system role the first user is told.
    `tools` as OpenAI has them."""
    messages: list[Message] = []
    for turn in turns:
        role = turn["role"]
        if role == "assistant" and (made := _calls(turn)):
            calls = "\n".join(map(_call, made))
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


def _introduced(messages: list[Message], tools: Sequence[Message], takes_system: bool) -> list[Message]:
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


_SHORT_IDS = re.compile(r"\[TOOL_CALLS\]")
_SHORT_ID = re.compile(r"[a-zA-Z0-9]{9}")
_ONE_AT_ONCE = re.compile(r"single tool-calls? at once")
_ALPHABET = string.digits + string.ascii_letters


def suited(messages: list[Message], source: str) -> list[Message]:
    """Messages with calls as the template of this source takes them, where it says that it takes no others: Mistral's
    ids have nine letters and digits, and Llama 3's answers one call, behind which its result stands."""
    if _SHORT_IDS.search(source):
        for message in messages:
            for call in _calls(message):
                call["id"] = _short(call.get("id"))
            if "tool_call_id" in message:
                message["tool_call_id"] = _short(message["tool_call_id"])
    return _one_by_one(messages) if _ONE_AT_ONCE.search(source) else messages


def with_contents(messages: list[Message]) -> bool:
    """Gives messages with calls and no content an empty one; whether there were such."""
    found = False
    for message in messages:
        if _calls(message) and message.get("content") is None:
            message["content"] = ""
            found = True
    return found


def as_texts(messages: list[Message]) -> bool:
    """Makes the arguments of calls JSON texts; whether there were others."""
    found = False
    for function in (call["function"] for message in messages for call in _calls(message)):
        if not isinstance(function.get("arguments", ""), str):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
            found = True
    return found


def _calls(message: Message) -> list[dict[str, Any]]:
    """Those that are such, since messages have been checked for being JSON only."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return []
    return [
        call
        for call in calls
        if isinstance(call, dict) and isinstance(call.get("function"), dict) and "name" in call["function"]
    ]


def _short(given: Any) -> str:
    if isinstance(given, str) and _SHORT_ID.fullmatch(given):
        return given
    number = int.from_bytes(blake2b(str(given).encode("utf-8", "replace"), digest_size=8).digest(), "big")
    digits = []
    for _ in range(9):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(digits)


def _one_by_one(messages: list[Message]) -> list[Message]:
    results = {str(message["tool_call_id"]): message for message in messages if "tool_call_id" in message}
    told: set[str] = set()
    parted: list[Message] = []
    for message in messages:
        calls = _calls(message)
        if len(calls) < 2:
            if str(message.get("tool_call_id")) not in told:
                parted.append(message)
            continue
        for call in calls:
            parted.append(message | {"tool_calls": [call]})
            message = message | {"content": None}
            number = str(call.get("id"))
            if number in results and number not in told:
                parted.append(results[number])
                told.add(number)
    return parted
