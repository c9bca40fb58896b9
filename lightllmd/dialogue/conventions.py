"""How the served model writes calls and reasoning, and what becomes of a dialogue for it: messages for its template,
the constraint and the parsers of its output."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from lightllmd.dialogue.grammar import CallsAsked, GrammarWriter, Thought, structural_tag
from lightllmd.dialogue.parser import OneCall, Parser
from lightllmd.dialogue.registry import FORMATS, HERMES, Format, Opening, Think, written_format, written_think
from lightllmd.dialogue.tools import Dialogue
from lightllmd.grammar.ebnf.translation import as_part
from lightllmd.requests.constraint import Constraint
from lightllmd.text.chat_template import ChatTemplate

AUTO = "auto"
_THINKING_SWITCHES = ("enable_thinking", "thinking")  # names of templates


@dataclass(frozen=True)
class PreparedChat:
    """A dialogue for this model. `prompt_end` of its methods: the last characters of the prompt, special tokens
    included, since an output may begin within reasoning."""

    messages: list[dict[str, Any]]
    options: dict[str, Any]  # as `ChatTemplate.render`
    dialogue: Dialogue
    format: Format
    writer: GrammarWriter
    think: Think | None  # what the model's reasoning stands between
    apart: bool  # it is told apart

    @property
    def parsed(self) -> bool:
        """Whether there may be more in the output than content."""
        return bool(self.dialogue.callable_tools) or self.apart or self.format.always

    @property
    def marks(self) -> frozenset[str]:
        """Tokens that are shown even where they are special."""
        if not self.parsed:
            return frozenset()
        calls = bool(self.dialogue.callable_tools) or self.format.always
        return (self.format.marks if calls else frozenset()) | frozenset((self.think or ()) if self.apart else ())

    def _inside(self, prompt_end: str) -> bool:
        return self.think is not None and prompt_end.rstrip().endswith(self.think[0])

    def parsers(self, prompt_end: str) -> Callable[[], Parser] | None:
        """What makes a parser for each sequence; None: all of the output is content."""
        if not self.parsed:
            return None
        think = self.think if self.apart else None
        opening = Opening(self.dialogue.callable_tools, think, think is not None and self._inside(prompt_end))
        open_parser = partial(self.format.parser, opening)
        return open_parser if self.dialogue.parallel else lambda: OneCall(open_parser())

    def constraint(self, prompt_end: str, content: Constraint | None) -> Constraint | None:
        """What the output has to be. `content`: what the client wants its text to be."""
        dialogue, writer, syntax = self.dialogue, self.writer, self.format.syntax
        tools = dialogue.callable_tools
        calls, thought = CallsAsked(tools, dialogue.parallel), Thought(self.think, self._inside(prompt_end))
        if tools and dialogue.choice.mode == "required":
            return _tag(writer.calling(syntax, calls, thought), dialogue.choice_field)
        if content is not None:
            if content.kind == "structural_tag" or not (tools or self.think or self.format.always):
                return content
            part = as_part(content.grammar, content.field)
            return _tag(writer.keeping_to(part, syntax, calls, thought), content.field)
        if any(tool.strict for tool in tools):
            return _tag(writer.talking(syntax, calls, thought), tools[0].field.partition(".")[0])
        return None


def _tag(nodes: list[dict[str, Any]], field: str) -> Constraint:
    return Constraint("structural_tag", structural_tag(nodes), field)


class Conventions:
    """Of one model and its settings. Immutable."""

    def __init__(
        self,
        template: ChatTemplate | None,
        *,
        special: Mapping[str, int] | None = None,
        tool_parser: str = AUTO,
        reasoning: bool = True,
    ) -> None:
        """`special`: ids of special tokens by their text. `tool_parser`: a name of `FORMATS`, or "auto"; `reasoning`:
        it is told apart where a request doesn't say."""
        source = template.text if template is not None else ""
        written = written_format(source)
        if written is not None and not written.always and not (template is not None and template.takes_tools):
            written = None
        self.format = FORMATS.get(tool_parser, written or HERMES)
        self.think = self.format.think or written_think(source)
        self._writer = self.format.writer(special or {})
        self._reasoning = reasoning
        self._source = source

    def prepare(self, messages: Sequence[dict[str, Any]], options: dict[str, Any], dialogue: Dialogue) -> PreparedChat:
        """`options` as `ChatTemplate.render`."""
        options = options | {"variables": self._variables(options.get("variables") or {}, dialogue)}
        if dialogue.callable_tools:
            options["tools"] = [tool.shown() for tool in dialogue.callable_tools]
        apart = self._reasoning if dialogue.reasoning is None else dialogue.reasoning
        apart = apart and self.think is not None
        return PreparedChat(list(messages), options, dialogue, self.format, self._writer, self.think, apart)

    def _variables(self, given: dict[str, Any], dialogue: Dialogue) -> dict[str, Any]:
        """The client's own, and how much it shall think, by the names that this template knows."""
        variables: dict[str, Any] = {}
        if dialogue.effort is not None:
            if self._knows("reasoning_effort"):
                variables["reasoning_effort"] = dialogue.effort
            if dialogue.effort == "none":
                variables |= {name: False for name in _THINKING_SWITCHES if self._knows(name)}
        return variables | given

    def _knows(self, name: str) -> bool:
        return re.search(rf"\b{name}\b", self._source) is not None
