"""What the output of an OpenAI route has to be: `response_format`, vLLM's `structured_outputs`, and flat fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import msgspec
from pydantic import Field, model_validator

from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import Body
from lightllmd.requests.guided import (
    Choices,
    GrammarText,
    GuidedFields,
    Pattern,
    Schema,
    choices,
    grammars,
    patterns,
    schemas,
    the_only_one,
    white_space,
)

FormatName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class NamedSchema(Body):
    """`json_schema` of a format. The output is constrained whether or not `strict` says so."""

    described = True
    lenient = True

    name: FormatName
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(default=None, alias="schema", description="absent: any JSON object")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`; TGI's clients send `value`, others `schema` beside json_object."""

    described = True
    lenient = True

    type: Literal["text", "json_object", "json_schema", "structural_tag", "json", "regex"]
    json_schema: NamedSchema | None = Field(default=None, description="with type json_schema")
    schema_: Schema | None = Field(default=None, alias="schema", description="of a json_object")
    value: Schema | None = Field(default=None, description="TGI's: the schema, or with type regex the pattern")
    format: dict[str, Any] | None = Field(default=None, description="with type structural_tag, as xgrammar has it")
    structures: list[dict[str, Any]] | None = Field(
        default=None, description="with type structural_tag, as vLLM has it"
    )
    triggers: list[str] | None = Field(default=None, description="with structures")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and self.json_schema is None and self.value is None:
            raise contradiction("json_schema", "json_schema is required with type json_schema")
        if self.type == "regex" and not isinstance(self.value, str):
            raise contradiction("value", "value should be the pattern with type regex")
        if self.type == "structural_tag" and self.format is None and self.structures is None:
            raise contradiction("format", "format, or structures and triggers, are required with type structural_tag")
        return self

    def constraints(self) -> list[Constraint]:
        """What it asks for; at most one."""
        place = "response_format"
        match self.type:
            case "text":
                return []
            case "regex":
                return patterns("regex", {f"{place}.value": str(self.value)})
            case "structural_tag":
                return [Constraint("structural_tag", self._tag(), place)]
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            return schemas(self.json_schema.schema_, f"{place}.json_schema.schema")
        named = schemas(self.schema_, f"{place}.schema") or schemas(self.value, f"{place}.value")
        return named or [Constraint("json_object", "", place)]

    def _tag(self) -> str:
        if self.format is not None:
            return msgspec.json.encode({"type": "structural_tag", "format": self.format}).decode()
        return msgspec.json.encode({"structures": self.structures, "triggers": self.triggers}).decode()


class StructuredOutputs(Body):
    """`structured_outputs`; one of its kinds."""

    lenient = True

    json_: Schema | None = Field(default=None, alias="json", description="a schema")
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | GrammarText | None = None
    whitespace_pattern: Annotated[str, Field(max_length=256)] | None = None
    disable_any_whitespace: bool = Field(default=False, description="JSON without white space between its tokens")
    disable_additional_properties: bool = Field(
        default=False, description="accepted without effect: only a schema that asks for others has them"
    )
    disable_fallback: bool = Field(default=False, description="accepted without effect")

    def constraints(self) -> list[Constraint]:
        """What it asks for."""
        place = "structured_outputs"
        given = "" if self.disable_any_whitespace else self.whitespace_pattern
        space = white_space(given, f"{place}.whitespace_pattern")
        tag = self.structural_tag
        if isinstance(tag, dict):
            tag = msgspec.json.encode(tag).decode()
        return [
            *schemas(self.json_, f"{place}.json", space),
            *patterns("regex", {f"{place}.regex": self.regex}),
            *choices(self.choice, f"{place}.choice"),
            *grammars(self.grammar, f"{place}.grammar", space),
            *([Constraint("json_object", "", f"{place}.json_object", space)] if self.json_object else []),
            *patterns("structural_tag", {f"{place}.structural_tag": tag}),
        ]


class StructuredFields(GuidedFields):
    """Of both OpenAI routes that generate."""

    response_format: ResponseFormat | None = Field(default=None, description="absent: text")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="as vLLM has it")

    @property
    def constraint(self) -> Constraint | None:
        """What the body asks for. Raises InvalidRequest for two things at once."""
        asked = [] if self.response_format is None else self.response_format.constraints()
        asked += [] if self.structured_outputs is None else self.structured_outputs.constraints()
        return the_only_one([*asked, *self.guided()])
