"""What an answer with calls has to look like, as xgrammar's structural tags: text with constrained parts.

Source: https://xgrammar.mlc.ai/docs/. Marks that are special tokens are told by their ids, since no text stands for
those in a grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.dialogue.tools import Tool
from lightllmd.errors import InvalidRequest
from lightllmd.grammar.ebnf.translation import NAMED

Node = dict[str, Any]

MOST_WHITESPACE = 20  # characters in a row between two tokens of JSON
_ANY_OBJECT: Node = {"type": "object", "additionalProperties": True}
_FINAL = "<|channel|>final<|message|>"
_NUMBER = "{number}"  # in a head: digits


@dataclass(frozen=True)
class CallSyntax:
    """How one format writes calls: `open` (`head` arguments `tail`) `between` … `close`."""

    head: str  # with {name}
    tail: str = ""
    open: str = ""
    between: str = ""
    close: str = ""
    style: str = "json"  # of the arguments: xgrammar's name, or "pythonic"
    several: bool = True
    excludes: tuple[str, ...] = ()  # what no string of the arguments may have, since it would end them


@dataclass(frozen=True)
class CallsAsked:
    """Which calls an answer may have."""

    tools: Sequence[Tool]
    parallel: bool = True  # several


@dataclass(frozen=True)
class Thought:
    """Reasoning before an answer."""

    marks: tuple[str, str] | None = None  # None: the model writes none
    begun: bool = False  # the prompt ends within it


class GrammarWriter:
    """Of one tokenizer."""

    def __init__(self, special: Mapping[str, int]) -> None:
        """`special`: ids of special tokens by their text."""
        self._special = special
        marks = sorted(special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, marks)) + ")") if marks else None

    # --- parts ----------------------------------------------------------------------------------------------------

    def literal(self, text: str) -> list[Node]:
        """Text as it stands there."""
        parts = self._split.split(text) if self._split is not None else [text]
        return [
            {"type": "token", "token": self._special[part]}
            if part in self._special
            else {"type": "const_string", "value": part}
            for part in parts
            if part
        ]

    def until(self, mark: str) -> Node:
        """Any text, and the mark that ends it."""
        if mark in self._special:
            number = self._special[mark]
            return _sequence([{"type": "any_tokens", "exclude_tokens": [number]}, {"type": "token", "token": number}])
        return {"type": "tag", "begin": "", "content": {"type": "any_text"}, "end": mark}

    # --- answers: what they are made of, one after another ----------------------------------------------------------

    def calling(self, syntax: CallSyntax, calls: CallsAsked, thought: Thought) -> list[Node]:
        """An answer that is at least one call, of arguments that are valid, behind reasoning."""
        return self._behind(thought, self.required(syntax, calls))

    def talking(self, syntax: CallSyntax, calls: CallsAsked, thought: Thought) -> list[Node]:
        """An answer of free text, in which calls of strict tools have valid arguments, those of others an object."""
        return [self._optional(syntax, calls)]

    def keeping_to(self, content: Node, syntax: CallSyntax, calls: CallsAsked, thought: Thought) -> list[Node]:
        """An answer whose text is constrained, behind reasoning; or, where there are tools, one of calls."""
        if not calls.tools:
            return self._behind(thought, [content])
        return self._behind(thought, [_either([_sequence(self.required(syntax, calls)), content])])

    def _behind(self, thought: Thought, rest: list[Node]) -> list[Node]:
        if thought.marks is None:
            return rest
        opening, close = thought.marks
        spaces: Node = {"type": "regex", "pattern": r"[ \n]{0,4}"}
        if thought.begun:
            return [self.until(close), spaces, *rest]
        reasoning = _sequence([*self.literal(opening), self.until(close), spaces])
        return [{"type": "optional", "content": reasoning}, *rest]

    # --- calls ----------------------------------------------------------------------------------------------------

    def required(self, syntax: CallSyntax, calls: CallsAsked) -> list[Node]:
        """One call at least, of arguments that are valid, and nothing else."""
        return [*self.literal(syntax.open), *self._calls(syntax, calls, validated=True)]

    def _optional(self, syntax: CallSyntax, calls: CallsAsked) -> Node:
        loop = calls.parallel and syntax.several
        if syntax.style == "pythonic":  # its first mark may stand in any text
            return {"type": "dispatch", "rules": self._by_name(syntax, calls), "loop": loop}
        beginning = self.literal(syntax.open or syntax.head.partition("{name}")[0])[0]
        if syntax.open:
            nodes = self.literal(syntax.open)[1:] + self._calls(syntax, calls, validated=False)
        else:
            nodes = [self._any_of(syntax, calls.tools, validated=False, without=beginning)]
        if beginning["type"] == "token":
            return {"type": "token_dispatch", "rules": [[beginning["token"], _sequence(nodes)]], "loop": loop}
        return {"type": "dispatch", "rules": [[beginning["value"], _sequence(nodes)]], "loop": loop}

    def _by_name(self, syntax: CallSyntax, calls: CallsAsked) -> list[list[Any]]:
        """Rules for each tool's first call: what it begins with and goes on with."""
        further = self._calls(syntax, calls, validated=False)[1:]
        rules: list[list[Any]] = []
        for tool in calls.tools:
            head = syntax.head.replace("{name}", tool.name)
            call = self._call(syntax, tool, tool.strict, {"type": "const_string", "value": head})
            rules.append([syntax.open + head, _sequence([call, *further])])
        return rules

    def _calls(self, syntax: CallSyntax, calls: CallsAsked, *, validated: bool) -> list[Node]:
        call = self._any_of(syntax, calls.tools, validated=validated)
        nodes = [call]
        if calls.parallel and syntax.several:
            nodes.append({"type": "star", "content": _sequence([*self.literal(syntax.between), call])})
        return nodes + self.literal(syntax.close)

    def _any_of(
        self, syntax: CallSyntax, tools: Sequence[Tool], *, validated: bool, without: Node | None = None
    ) -> Node:
        """`without`: what each call begins with, and has been written."""
        nodes = [self._call(syntax, tool, validated or tool.strict, without) for tool in tools]
        return _either(nodes)

    def _call(self, syntax: CallSyntax, tool: Tool, validated: bool, without: Node | None) -> Node:
        head = syntax.head.replace("{name}", tool.name)
        if without is not None and without["type"] == "const_string":
            head = head.removeprefix(without["value"])
        nodes: list[Node] = []
        for index, part in enumerate(head.split(_NUMBER)):
            if index:
                nodes.append({"type": "regex", "pattern": "[0-9]{1,4}"})
            nodes += self.literal(part)
        if without is not None and without["type"] == "token":
            nodes = nodes[1:]
        if syntax.style == "pythonic":
            nodes += self._keyword_arguments(tool, validated)
        else:
            arguments = schema_node(tool.schema if validated else _ANY_OBJECT, syntax.style, syntax.excludes)
            nodes.append(arguments | {NAMED: f"{tool.field}.parameters"})
        return _sequence(nodes + self.literal(syntax.tail))

    def _keyword_arguments(self, tool: Tool, validated: bool) -> list[Node]:
        schema = tool.schema
        properties = schema.get("properties", {})
        unusual = schema.keys() & {"anyOf", "oneOf", "allOf", "$ref", "not", "if", "patternProperties"}
        if unusual or not isinstance(properties, dict):
            field = f"{tool.field}.parameters"
            told = ", ".join(sorted(unusual)) or "properties that are none"
            raise InvalidRequest(
                f"{field}: this model writes calls as Python does, whose arguments can be constrained to an object "
                f"with properties only; got {told}",
                param=field,
            )
        shared = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
        required = [name for name in schema.get("required", ()) if name in properties]
        others = [name for name in properties if name not in required]
        if not validated:
            required, others = [], [*required, *others]

        def argument(name: str, lead: str) -> Node:
            told = properties[name]
            value = schema_node({**told, **shared} if isinstance(told, dict) else told)
            value[NAMED] = f"{tool.field}.parameters.properties.{name}"
            return _sequence([{"type": "const_string", "value": f"{lead}{name}="}, value])

        behind = [{"type": "optional", "content": argument(name, ", ")} for name in others]
        if required:
            return [argument(name, ", " if index else "") for index, name in enumerate(required)] + behind
        if not others:
            return []
        firsts = [_sequence([argument(name, ""), *behind[at + 1 :]]) for at, name in enumerate(others)]
        return [{"type": "optional", "content": _either(firsts)}]


class HarmonyWriter(GrammarWriter):
    """Answers are messages in channels; the prompt has begun the header of the first."""

    def calling(self, syntax: CallSyntax, calls: CallsAsked, thought: Thought) -> list[Node]:
        return [self._message("analysis"), self._message("commentary"), *self.required(syntax, calls)]

    def talking(self, syntax: CallSyntax, calls: CallsAsked, thought: Thought) -> list[Node]:
        free = _sequence([*self.literal(_FINAL), {"type": "any_text"}])
        call = self._any_of(syntax, calls.tools, validated=False)
        return [self._message("analysis"), self._message("commentary"), _either([call, free])]

    def keeping_to(self, content: Node, syntax: CallSyntax, calls: CallsAsked, thought: Thought) -> list[Node]:
        final = _sequence([*self.literal(_FINAL), content])
        answers = [*self.required(syntax, calls), final] if calls.tools else [final]
        return [self._message("analysis"), _either(answers)]

    def _message(self, channel: str) -> Node:
        """One that may come before the last."""
        begin = self.literal(f"<|channel|>{channel}<|message|>")
        return {
            "type": "optional",
            "content": _sequence([*begin, self.until("<|end|>"), *self.literal("<|start|>assistant")]),
        }


def schema_node(schema: Any, style: str = "json", excludes: Sequence[str] = ()) -> Node:
    """What is valid under a JSON schema. `excludes`: texts that no string has."""
    node = {"type": "json_schema", "json_schema": schema, "style": style, "max_whitespace_cnt": MOST_WHITESPACE}
    return node | {"excludes": list(excludes)} if excludes else node


def _sequence(nodes: Sequence[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else {"type": "sequence", "elements": list(nodes)}


def _either(nodes: Sequence[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else {"type": "or", "elements": list(nodes)}


def structural_tag(nodes: Sequence[Node]) -> str:
    """The JSON of all that comes one after another."""
    return json.dumps({"type": "structural_tag", "format": _sequence(nodes)}, ensure_ascii=False)
