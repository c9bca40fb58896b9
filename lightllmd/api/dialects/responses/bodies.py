"""The body of /v1/responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lightllmd.api.dialects.openai.bodies import SamplingFields
from lightllmd.api.dialects.openai.structured import StructuredOutputs
from lightllmd.api.dialects.responses.items import Identifier, InputMessage, Item, Items, prepared
from lightllmd.dialogue.tools import MAX_TOOL_NAME, MAX_TOOLS, Dialogue, Tool, ToolChoice, check_tools
from lightllmd.errors import InvalidRequest
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import MAX_COUNT, MAX_LOGPROBS, Body, RefusedField
from lightllmd.requests.guided import GuidedFields, schemas, the_only_one

MAX_METADATA = 16  # pairs
LOGPROBS = "message.output_text.logprobs"  # of `include`

_ELSEWHERE = ("not available here", "unsupported_parameter")  # why, and the code of the error
_FORMAT_NAME = r"^[A-Za-z0-9_-]{1,64}$"

ToolName = Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME)]


class ResponseFunction(Body):
    """A function that the model may call."""

    lenient = True

    type: Literal["function"]
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = Field(default=None, description="true: calls are constrained to the schema")


class ChosenFunction(Body):
    """Of a choice."""

    lenient = True

    type: Literal["function"]
    name: ToolName


class AllowedFunctions(Body):
    """Some of the tools."""

    lenient = True

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[ChosenFunction], Field(min_length=1, max_length=MAX_TOOLS)]


class PlainFormat(Body):
    """Text, or any JSON object."""

    lenient = True

    type: Literal["text", "json_object"]


class SchemaFormat(Body):
    """JSON that is valid under a schema, whether or not `strict` says so."""

    described = True
    lenient = True

    type: Literal["json_schema"]
    name: Annotated[str, Field(pattern=_FORMAT_NAME)]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class TextSettings(Body):
    """`text`."""

    lenient = True

    format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] = PlainFormat(type="text")
    verbosity: Literal["low", "medium", "high"] | None = Field(
        default=None, description="reaches the model's chat template under this name"
    )


class ReasoningSettings(Body):
    """`reasoning`."""

    lenient = True

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="any: the reasoning is told as its own summary, and not as content"
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        default=None, description="the older name of summary"
    )

    @property
    def summarised(self) -> bool:
        """Whether a summary is asked for."""
        return (self.summary or self.generate_summary) is not None


class ResponsesBody(GuidedFields, SamplingFields):
    """The body of /v1/responses."""

    without_effect = frozenset(
        {
            "access_programs",
            "background_options",
            "image",
            "prompt_cache_options",
            "stream_options",
        }
    )
    # Features of OpenAI's own service.
    refused: ClassVar[Mapping[str, RefusedField]] = {
        "background": RefusedField((None, False), *_ELSEWHERE),
        "conversation": RefusedField((None,), *_ELSEWHERE),
        "prompt": RefusedField((None,), *_ELSEWHERE),
        "context_management": RefusedField((None, []), *_ELSEWHERE),
        "moderation": RefusedField((None,), *_ELSEWHERE),
        "prompt_logprobs": RefusedField(why="a response has no room for them", inherited=True),
    }

    input: str | Items
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    tools: Annotated[list[ResponseFunction], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ChosenFunction | AllowedFunctions | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None, description="of tools that run at the server, of which there are none"
    )
    text: TextSettings = TextSettings()
    reasoning: ReasoningSettings = ReasoningSettings()
    previous_response_id: Identifier | None = None
    store: bool | None = Field(default=None, description="absent: true; see [http] stored_responses")
    stream: bool | None = None
    truncation: Literal["auto", "disabled"] | None = Field(
        default=None, description="auto: of a conversation that is too long the oldest items are left out"
    )
    include: (
        list[
            Literal[
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "message.input_image.image_url",
                "computer_call_output.output.image_url",
                "code_interpreter_call.outputs",
                "reasoning.encrypted_content",
                "message.output_text.logprobs",
            ]
        ]
        | None
    ) = Field(default=None, description="message.output_text.logprobs alone has an effect")
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
            Field(max_length=MAX_METADATA),
        ]
        | None
    ) = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast", "ultrafast"] | None = None
    structured_outputs: StructuredOutputs | None = Field(default=None, description="as vLLM has it")
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="further names for the model's chat template, such as enable_thinking"
    )

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        """See `Body`."""
        body = super().prepare(body)
        _refuse_tools(body)
        return body | {"input": prepared(body["input"])} if "input" in body else body

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_output_tokens is not None and self.min_tokens > self.max_output_tokens:
            raise contradiction(
                "min_tokens",
                f"min_tokens should be at most max_output_tokens = {self.max_output_tokens}; got {self.min_tokens}",
            )
        check_tools(self.dialogue)
        return self

    @property
    def stored(self) -> bool:
        """Whether the response is to be kept."""
        return self.store is not False

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are shown."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)

    @property
    def items(self) -> list[Item]:
        """The input, each item with an id; references are among them."""
        if isinstance(self.input, str):
            message = {"type": "message", "role": "user", "content": self.input}
            return [InputMessage.model_validate(message).item()]
        return [item.item() for item in self.input]

    @property
    def constraint(self) -> Constraint | None:
        """What the text has to be, as one of the fields says. Raises InvalidRequest for two of them."""
        given = self.text.format
        asked: list[Constraint] = []
        if isinstance(given, SchemaFormat):
            asked = schemas(given.schema_, "text.format.schema")
        elif given.type == "json_object":
            asked = [Constraint("json_object", "", "text.format")]
        asked += [] if self.structured_outputs is None else self.structured_outputs.constraints()
        return the_only_one([*asked, *self.guided()])

    @property
    def dialogue(self) -> Dialogue:
        """What is asked beyond text."""
        return Dialogue(
            tools=[
                Tool(tool.name, tool.description, tool.parameters, bool(tool.strict), f"tools.{index}")
                for index, tool in enumerate(self.tools or ())
            ],
            choice=self._choice,
            parallel=self.parallel_tool_calls is not False,
            effort=self.reasoning.effort,
        )

    @property
    def _choice(self) -> ToolChoice:
        match self.tool_choice:
            case None:
                return ToolChoice()
            case ChosenFunction(name=name):
                return ToolChoice("required", [name])
            case AllowedFunctions(mode=mode, tools=tools):
                return ToolChoice(mode, [tool.name for tool in tools])
            case mode:
                return ToolChoice(mode)

    @property
    def variables(self) -> dict[str, Any]:
        """For the chat template."""
        verbosity = self.text.verbosity
        return ({} if verbosity is None else {"verbosity": verbosity}) | self.chat_template_kwargs


def _refuse_tools(body: dict[str, Any]) -> None:
    """Raises InvalidRequest for tools that OpenAI's own service runs."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    places = [(f"tools.{index}", tool) for index, tool in enumerate(tools if isinstance(tools, list) else ())]
    for path, tool in [*places, ("tool_choice", choice)]:
        kind = tool.get("type") if isinstance(tool, dict) else None
        known = ("function", "allowed_tools") if path == "tool_choice" else ("function",)
        if isinstance(kind, str) and kind not in known:
            raise InvalidRequest(
                f"{path}.type: {kind[:MAX_TOOL_NAME]!r} is not available here, {' or '.join(map(repr, known))} is",
                param=f"{path}.type",
                code="unsupported_value",
            )
