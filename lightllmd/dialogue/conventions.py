"""How the served model writes calls and reasoning, and what becomes of a dialogue for it: messages for its template,
and the parsers of its output."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from lightllmd.dialogue.parser import OneCall, Parser
from lightllmd.dialogue.registry import FORMATS, HERMES, Format, Opening, written_format, written_think
from lightllmd.dialogue.tools import Dialogue
from lightllmd.text.chat_template import ChatTemplate

AUTO = "auto"
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # names of templates


@dataclass(frozen=True)
class PreparedChat:
    """A dialogue for this model."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]  # as `ChatTemplate.render`
    opening: Opening | None  # None: all of the output is content
    marks: frozenset[str]  # shown even where they are special tokens
    format: Format
    parallel: bool  # several calls in one answer

    def parsers(self, prompt_end: str) -> Callable[[], Parser] | None:
        """What makes a parser for each sequence. `prompt_end`: the last characters of the prompt, special tokens
        included; output may begin within reasoning."""
        opening = self.opening
        if opening is None:
            return None
        if opening.think is not None and prompt_end.rstrip().endswith(opening.think[0]):
            opening = replace(opening, inside=True)
        open_parser = partial(self.format.parser, opening)
        return open_parser if self.parallel else lambda: OneCall(open_parser())


class Conventions:
    """Of one model and its settings. Immutable."""

    def __init__(self, template: ChatTemplate | None, *, tool_parser: str = AUTO, reasoning: bool = True) -> None:
        """`tool_parser`: a name of `FORMATS`, or "auto"; `reasoning`: it is told apart where a request doesn't say."""
        source = template.text if template is not None else ""
        chosen = written_format(source) if template is not None and template.takes_tools else None
        self.format = FORMATS.get(tool_parser, chosen or HERMES)
        self.think = written_think(source)
        self._reasoning = reasoning
        self._source = source

    def prepare(self, messages: Sequence[dict[str, Any]], options: dict[str, Any], dialogue: Dialogue) -> PreparedChat:
        """`options` as `ChatTemplate.render`."""
        tools = dialogue.callable_tools
        think = self.think if self._tells_reasoning(dialogue) else None
        options = options | {"variables": self._variables(options.get("variables") or {}, dialogue)}
        if tools:
            options["tools"] = [tool.shown() for tool in tools]
        opening = Opening(tools, think) if tools or think is not None else None
        marks = (self.format.marks if tools else frozenset()) | frozenset(think or ())
        return PreparedChat(list(messages), options, opening, marks, self.format, dialogue.parallel)

    def _tells_reasoning(self, dialogue: Dialogue) -> bool:
        return self._reasoning if dialogue.reasoning is None else dialogue.reasoning

    def _variables(self, given: dict[str, Any], dialogue: Dialogue) -> dict[str, Any]:
        """The client's own, and how much it shall think, by the names that this template knows."""
        variables: dict[str, Any] = {}
        if dialogue.effort is not None:
            if re.search(r"\breasoning_effort\b", self._source):
                variables["reasoning_effort"] = dialogue.effort
            if dialogue.effort == "none":
                variables |= {name: False for name in _THINKING_SWITCHES if re.search(rf"\b{name}\b", self._source)}
        return variables | given
