"""The tools that a model may call, and whether it shall."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from lightllmd.errors import InvalidRequest

MAX_TOOLS = 128
MAX_SCHEMA = 1 << 16  # bytes of a tool's parameters as JSON
MAX_CONSTRAINED = 1 << 18  # bytes of the parameters of all tools whose calls are constrained to them
MAX_TOOL_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class Tool:
    """A function of the client's."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON schema of an object; None: it takes none
    strict: bool = False  # calls of it are constrained to the schema
    field: str = "tools"  # the dialect's path to it, for refusals

    def shown(self) -> dict[str, Any]:
        """As chat templates take it: OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.schema
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments."""
        return self.parameters or {"type": "object", "properties": {}}


@dataclass(frozen=True)
class ToolChoice:
    """`required`: at least one is called. `names`: those that may be; empty: all."""

    mode: Literal["none", "auto", "required"] = "auto"
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Dialogue:
    """What is asked of an answer beyond its text, in no dialect. Messages are OpenAI's: role, content, tool_calls,
    tool_call_id, name, reasoning_content. A dialect calls `check_tools` where it checks its bodies."""

    tools: Sequence[Tool] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    parallel: bool = True  # several calls in one answer
    reasoning: bool | None = None  # told apart from content; None: as the server is set, False: it is part of it
    effort: str | None = None  # "low", "medium", "high", …: for templates that know it
    choice_field: str = "tool_choice"  # the dialect's name

    @property
    def callable_tools(self) -> list[Tool]:
        """Those that the answer may call."""
        if self.choice.mode == "none":
            return []
        names = self.choice.names
        return [tool for tool in self.tools if not names or tool.name in names]


def check_tools(dialogue: Dialogue, field: str = "tools") -> None:
    """Raises InvalidRequest, which names the dialect's field (`Tool.field`), value and bound."""
    tools, choice = dialogue.tools, dialogue.choice
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"{field}: at most {MAX_TOOLS} tools; got {len(tools)}", param=field)
    seen: dict[str, Tool] = {}
    for tool in tools:
        where = f"{tool.field}.name"
        if not 1 <= len(tool.name) <= MAX_TOOL_NAME or not _NAME.fullmatch(tool.name):
            told = tool.name[:MAX_TOOL_NAME]
            raise InvalidRequest(
                f"{where}: should be 1 to {MAX_TOOL_NAME} letters, digits, _, . or -; got {told!r}", param=where
            )
        if tool.name in seen:
            raise InvalidRequest(f"{where}: {tool.name!r} is the name of {seen[tool.name].field}, too", param=where)
        seen[tool.name] = tool
        size = len(msgspec.json.encode(tool.parameters))
        if size > MAX_SCHEMA:
            where = f"{tool.field}.parameters"
            raise InvalidRequest(f"{where}: at most {MAX_SCHEMA} bytes of JSON; got {size}", param=where)
    constrained = [tool for tool in tools if tool.strict or choice.mode == "required"]
    total = sum(len(msgspec.json.encode(tool.parameters)) for tool in constrained)
    if total > MAX_CONSTRAINED:
        raise InvalidRequest(
            f"{field}: the parameters that calls are constrained to have at most {MAX_CONSTRAINED} bytes of JSON in "
            f"all; got {total}",
            param=field,
        )
    if choice.mode == "required" and not tools:
        raise InvalidRequest(
            f"{dialogue.choice_field}: {choice.mode!r} needs tools; there are none", param=dialogue.choice_field
        )
    for name in choice.names:
        if name not in seen:
            known = ", ".join(seen) or "none"
            raise InvalidRequest(
                f"{dialogue.choice_field}: {name!r} is no tool of this request; known are {known}",
                param=dialogue.choice_field,
            )
