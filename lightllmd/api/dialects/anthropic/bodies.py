"""The bodies of Anthropic's routes: what is asked of the model, what has no effect, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lightllmd.api.dialects.anthropic.blocks import (
    MAX_MESSAGES,
    BlockMessage,
    Name,
    Texts,
    prepared,
    prepared_blocks,
    turns,
)
from lightllmd.dialogue.tools import MAX_TOOLS, Dialogue, Tool, ToolChoice, check_tools
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.asked import Asked, Chat, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import contradiction, shown
from lightllmd.requests.fields import MAX_COUNT, Body, RefusedField, StopText, affordable_stops
from lightllmd.requests.urgency import UrgencyFields
from lightllmd.text.stop import MAX_STOPS

LEAST_BUDGET = 1024  # tokens for thinking, as Anthropic documents
THINKING_SWITCHES = ("enable_thinking", "thinking")  # what chat templates call it

_DROPPED_OF_A_TOOL = frozenset(
    {"allowed_callers", "cache_control", "defer_loading", "eager_input_streaming", "input_examples"}
)


class AnthropicTool(Body):
    """A tool of the client's own."""

    lenient = True

    type: Literal["custom"] = "custom"
    name: Name
    description: str = ""
    input_schema: dict[str, Any]
    strict: bool = Field(default=False, description="the input of each call validates against the schema")

    def tool(self, field: str) -> Tool:
        """In no dialect."""
        return Tool(self.name, self.description or None, self.input_schema, self.strict, field)


class AnthropicToolChoice(Body):
    """Whether tools are called."""

    lenient = True

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            words = "name is required with the type 'tool'" if self.name is None else "name is for the type 'tool' only"
            raise contradiction("name", words)
        return self

    @property
    def choice(self) -> ToolChoice:
        """In no dialect."""
        if self.type in ("none", "auto"):
            return ToolChoice(self.type)
        return ToolChoice("required", () if self.name is None else (self.name,))


class Thinking(Body):
    """Whether the model reasons before it answers, where its chat template can be told."""

    described = True
    lenient = True

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=LEAST_BUDGET, le=MAX_COUNT)] | None = Field(
        default=None, description="required if enabled; no bound of its own: max_tokens counts thinking, too"
    )
    display: Literal["summarized", "omitted"] | None = Field(
        default=None, description="omitted: thinking blocks are empty"
    )

    @model_validator(mode="after")
    def _budget(self) -> Self:
        if (self.type == "enabled") != (self.budget_tokens is not None):
            words = "required" if self.budget_tokens is None else "for the type 'enabled' only"
            raise contradiction("budget_tokens", f"budget_tokens is {words}")
        return self


class OutputFormat(Body):
    """What an answer's text has to be."""

    lenient = True

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    def constraint(self, field: str) -> Constraint:
        """In no dialect."""
        return Constraint("json_schema", json.dumps(self.schema_), f"{field}.schema")


class OutputConfig(Body):
    """How the model answers."""

    lenient = True

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="reasoning_effort of the chat template: low, medium, or high for what is above"
    )
    format: OutputFormat | None = None


class ConversationBody(Body):
    """What becomes a prompt."""

    lenient = True
    without_effect = frozenset(
        {
            "anthropic_beta",
            "anthropic_version",
            "betas",
            "cache_control",
            "diagnostics",
            "inference_geo",
            "metadata",
            "service_tier",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )
    refused: ClassVar[Mapping[str, RefusedField]] = {
        "container": RefusedField(),
        "mcp_servers": RefusedField((None, [])),
    }

    model: str
    messages: Annotated[list[BlockMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: Texts | None = None
    thinking: Thinking | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: AnthropicToolChoice | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(default=None, description="the same as output_config.format")

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        body = super().prepare(body)
        if "messages" in body:
            body["messages"] = prepared(body["messages"])
        if "system" in body:
            body["system"] = prepared_blocks(body["system"], "system")
        if isinstance(body.get("tools"), list):
            body["tools"] = [_tool(tool, f"tools.{index}") for index, tool in enumerate(body["tools"])]
        return body

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_tools(self.dialogue)
        if self.output_format is not None and self.output_config is not None and self.output_config.format is not None:
            raise contradiction("output_format", "output_format: output_config.format says it already")
        return self

    @property
    def continued(self) -> bool:
        """Whether the answer goes on with the text of the last message."""
        return self.messages[-1].role == "assistant"

    @property
    def dialogue(self) -> Dialogue:
        """In no dialect."""
        choice, config = self.tool_choice, self.output_config
        effort = None if config is None else config.effort
        return Dialogue(
            [tool.tool(f"tools.{index}") for index, tool in enumerate(self.tools)],
            ToolChoice() if choice is None else choice.choice,
            parallel=choice is None or not choice.disable_parallel_tool_use,
            reasoning=True if self.thinks else None,
            effort="high" if effort in ("xhigh", "max") else effort,
        )

    @property
    def thinks(self) -> bool | None:
        """None: as the model's chat template has it."""
        return None if self.thinking is None else self.thinking.type != "disabled"

    def chat(self) -> Chat:
        """As the model's template takes it."""
        options = {
            "add_generation_prompt": not self.continued,
            "continue_final_message": self.continued,
            "variables": {} if self.thinks is None else dict.fromkeys(THINKING_SWITCHES, self.thinks),
        }
        return Chat.of(turns(self.system, self.messages), options)


class CountTokensBody(ConversationBody):
    """The body of /v1/messages/count_tokens."""


class MessagesBody(UrgencyFields, ConversationBody):
    """The body of /v1/messages."""

    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] = Field(
        description="new tokens at most; 0: the prompt is run for the prompt cache, nothing is generated"
    )
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS), AfterValidator(affordable_stops)] = []
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=MAX_COUNT)] = Field(default=0, description="0: off")

    @model_validator(mode="after")
    def _budget(self) -> Self:
        budget = None if self.thinking is None else self.thinking.budget_tokens
        if budget is not None and budget >= self.max_tokens:
            raise contradiction(
                "thinking.budget_tokens",
                f"thinking.budget_tokens: should be less than max_tokens = {self.max_tokens}; got {budget}",
            )
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What the answer's text has to be."""
        if self.output_format is not None:
            return self.output_format.constraint("output_format")
        if self.output_config is not None and self.output_config.format is not None:
            return self.output_config.format.constraint("output_config.format")
        return None

    def asked(self) -> Asked:
        """Where max_tokens don't fit behind the prompt, as many as do are generated: see `MessageReply.stop_reason`."""
        sampled = self.temperature >= 1e-5
        params = SamplingParams(
            do_sample=sampled,
            temperature=self.temperature if sampled else 1.0,
            top_p=self.top_p,
            top_k=self.top_k or -1,
            max_new_tokens=self.max_tokens or MAX_COUNT,
        )
        return Asked(
            [Prompt(self.chat(), "messages", self.continued)],
            params,
            TextOptions(include_stop=False, spaces_between_special_tokens=False, prompt_only=self.max_tokens == 0),
            FieldNames("messages", stops="stop_sequences", subject="messages"),
            self.model,
            None if self.max_tokens else 0,
            self.max_tokens,
            stop_texts=self.stop_sequences,
            shows_prompt=False,
            dialogue=self.dialogue,
            constraint=self.constraint,
        )


def _tool(tool: Any, path: str) -> Any:
    if not isinstance(tool, dict):
        return tool
    kind = tool.get("type")
    if isinstance(kind, str) and kind != "custom":
        raise InvalidRequest(
            f"{path}.type: tools of type {shown(kind)} are not available here, those of type 'custom' are",
            param=f"{path}.type",
        )
    return {name: value for name, value in tool.items() if name not in _DROPPED_OF_A_TOOL}
