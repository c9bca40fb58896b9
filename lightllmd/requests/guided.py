"""The flat fields that say what the output has to be, with the names of LightLLM and of older vLLM: of the native API,
of `LLM.generate` and of the OpenAI routes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
from pydantic import Field

from lightllmd.errors import InvalidRequest
from lightllmd.grammar.ebnf.json_schema import layout
from lightllmd.ipc.messages import GrammarKind
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.fields import Body

MAX_PATTERN = 1 << 16  # characters of a pattern or of one choice
MAX_GRAMMAR = 512 << 10  # characters of a grammar, of a schema that is given as text
MAX_CHOICES = 10_000
_ANY_JSON = "json"  # LightLLM's name of a grammar

Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN)]
GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR)]
Schema = dict[str, Any] | bool | GrammarText
Choices = Annotated[
    list[Annotated[str, Field(max_length=MAX_PATTERN)]], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
]


class GuidedFields(Body):
    """At most one of them, but for the white space."""

    guided_json: Schema | None = Field(
        default=None, description="the output is JSON that is valid under this schema, an object or its text"
    )
    guided_regex: Pattern | None = Field(default=None, description="the whole output matches this pattern")
    regular_constraint: Pattern | None = Field(default=None, description="LightLLM's name of guided_regex")
    guided_choice: Choices | None = Field(default=None, description="the output is one of these texts")
    guided_grammar: GrammarText | None = Field(
        default=None,
        description="the output follows this grammar, in EBNF as llama.cpp has it, or Lark's; json: any JSON",
    )
    guided_whitespace_pattern: Annotated[str, Field(max_length=256)] | None = Field(
        default=None, description="what may stand between the tokens of JSON; absent: a space after a comma or colon"
    )
    guided_decoding_backend: str | None = Field(default=None, description="accepted without effect")

    def guided(self, prefix: str = "") -> list[Constraint]:
        """What these fields ask for; `prefix` of their names. Raises InvalidRequest."""
        space = white_space(self.guided_whitespace_pattern, f"{prefix}guided_whitespace_pattern")
        return [
            *schemas(self.guided_json, f"{prefix}guided_json", space),
            *patterns("regex", {f"{prefix}guided_regex": self.guided_regex}),
            *patterns("regex", {f"{prefix}regular_constraint": self.regular_constraint}),
            *choices(self.guided_choice, f"{prefix}guided_choice"),
            *grammars(self.guided_grammar, f"{prefix}guided_grammar", space),
        ]


def the_only_one(constraints: Iterable[Constraint]) -> Constraint | None:
    """Raises InvalidRequest for several, naming both."""
    found = list(constraints)
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise InvalidRequest(
            f"{second}: {first} says already what the output has to be; one of them, not both", param=second
        )
    return found[0] if found else None


def white_space(pattern: str | None, field: str) -> str | None:
    """A pattern that matches white space only. Raises InvalidRequest."""
    if pattern is not None:
        layout(pattern, field)
    return pattern


def schemas(schema: Schema | None, field: str, whitespace: str | None = None) -> list[Constraint]:
    """Of a field that has a schema, perhaps as text."""
    if schema is None:
        return []
    text = schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()
    return [Constraint("json_schema", text, field, whitespace)]


def patterns(kind: GrammarKind, named: Mapping[str, str | None]) -> list[Constraint]:
    """Of fields that have a text as it is."""
    return [Constraint(kind, text, field) for field, text in named.items() if text is not None]


def choices(texts: list[str] | None, field: str) -> list[Constraint]:
    """Of a field that has texts."""
    return [] if texts is None else [Constraint("choice", msgspec.json.encode(texts).decode(), field)]


def grammars(grammar: str | None, field: str, whitespace: str | None = None) -> list[Constraint]:
    """Of a field that has a grammar, or LightLLM's name of one."""
    if grammar == _ANY_JSON:
        return schemas(True, field, whitespace)
    return patterns("ebnf", {field: grammar})
