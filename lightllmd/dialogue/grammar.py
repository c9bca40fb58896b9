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

Node = dict[str, Any]

MOST_WHITESPACE = 20  # characters in a row between two tokens of JSON
_ANY_OBJECT: Node = {"type": "object"}
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

    def behind_reasoning(self, think: tuple[str, str] | None, inside: bool, rest: list[Node]) -> list[Node]:
        """`rest`, before which there may be reasoning, or has to be the end of it."""
        if think is None:
            return rest
        spaces: Node = {"type": "regex", "pattern": r"[ \n]{0,4}"}
        if inside:
            return [self.until(think[1]), spaces, *rest]
        thought = _sequence([*self.literal(think[0]), self.until(think[1]), spaces])
        return [{"type": "optional", "content": thought}, *rest]

    # --- calls ----------------------------------------------------------------------------------------------------

    def required(self, syntax: CallSyntax, tools: Sequence[Tool], parallel: bool) -> list[Node]:
        """One call at least, of arguments that are valid, and nothing else."""
        return [*self.literal(syntax.open), *self._calls(syntax, tools, parallel, validated=True)]

    def optional(self, syntax: CallSyntax, tools: Sequence[Tool], parallel: bool) -> Node:
        """Free text, in which calls of strict tools have valid arguments, those of others an object."""
        beginning = self.literal(syntax.open or _common(syntax))[0]
        rules = self._calls(syntax, tools, parallel, validated=False)
        if syntax.open:
            rules = self.literal(syntax.open)[1:] + rules
        else:
            call = self._any_of(syntax, tools, validated=False, without=beginning)
            rules = [call]
        loop = parallel and syntax.several
        if beginning["type"] == "token":
            return {"type": "token_dispatch", "rules": [[beginning["token"], _sequence(rules)]], "loop": loop}
        return {"type": "dispatch", "rules": [[beginning["value"], _sequence(rules)]], "loop": loop}

    def _calls(self, syntax: CallSyntax, tools: Sequence[Tool], parallel: bool, *, validated: bool) -> list[Node]:
        call = self._any_of(syntax, tools, validated=validated)
        nodes = [call]
        if parallel and syntax.several:
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
            nodes.append(schema_node(tool.schema if validated else _ANY_OBJECT, syntax.style))
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
            value = schema_node({**told, **shared} if isinstance(told, dict) else told, "json")
            return _sequence([{"type": "const_string", "value": f"{lead}{name}="}, value])

        behind = [{"type": "optional", "content": argument(name, ", ")} for name in others]
        if required:
            return [argument(name, ", " if index else "") for index, name in enumerate(required)] + behind
        if not others:
            return []
        firsts = [_sequence([argument(name, ""), *behind[at + 1 :]]) for at, name in enumerate(others)]
        return [{"type": "optional", "content": _either(firsts)}]


def _common(syntax: CallSyntax) -> str:
    return syntax.head.partition("{name}")[0]


def schema_node(schema: Any, style: str = "json") -> Node:
    """What is valid under a JSON schema."""
    return {"type": "json_schema", "json_schema": schema, "style": style, "max_whitespace_cnt": MOST_WHITESPACE}


def content_node(kind: str, text: str) -> Node:
    """What a `Constraint` of another kind than structural_tag asks for, as a part of one."""
    if kind == "json_object":
        return schema_node(_ANY_OBJECT)
    if kind == "json_schema":
        return schema_node(json.loads(text))
    if kind == "regex":
        return {"type": "regex", "pattern": text}
    if kind == "ebnf":
        return {"type": "grammar", "grammar": text}
    return {"type": "or", "elements": [{"type": "const_string", "value": one} for one in json.loads(text)]}


def _sequence(nodes: Sequence[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else {"type": "sequence", "elements": list(nodes)}


def _either(nodes: Sequence[Node]) -> Node:
    return nodes[0] if len(nodes) == 1 else {"type": "or", "elements": list(nodes)}


def structural_tag(nodes: Sequence[Node]) -> str:
    """The JSON of all that comes one after another."""
    return json.dumps({"type": "structural_tag", "format": _sequence(nodes)}, ensure_ascii=False)
