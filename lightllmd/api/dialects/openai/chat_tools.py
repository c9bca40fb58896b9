"""The fields of a chat that are about tools and reasoning."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lightllmd.dialogue.tools import MAX_TOOLS, Dialogue, Tool, ToolChoice, check_tools
from lightllmd.errors import InvalidRequest
from lightllmd.requests.fields import Body

ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(Body):
    """A function that the model may call."""

    described = True
    lenient = True

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(default=None, description="JSON schema of an object")
    strict: bool | None = Field(default=None, description="calls are constrained to the schema of the parameters")

    def tool(self, field: str) -> Tool:
        """In no dialect."""
        return Tool(self.name, self.description, self.parameters, bool(self.strict), field)


class ToolDefinition(Body):
    """An entry of `tools`."""

    lenient = True

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """Names one of the tools."""

    lenient = True

    name: ToolName


class NamedTool(Body):
    """A tool that is meant."""

    lenient = True

    type: Literal["function"] = "function"
    function: FunctionName


class AllowedTools(Body):
    """Those of the tools that may be called."""

    lenient = True

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedToolsChoice(Body):
    """OpenAI's form of it."""

    lenient = True

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class DialogueFields(Body):
    """Of a chat."""

    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        default=None, description="functions that the model may call"
    )
    tool_choice: Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None = Field(
        default=None,
        description="absent: auto, which leaves it to the model. With required, and with the name of a tool, the "
        "answer is constrained to calls whose arguments fit their schemas",
    )
    parallel_tool_calls: bool | None = Field(default=None, description="false: one call at most")
    functions: Annotated[list[FunctionDefinition], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        default=None, description="the older form of tools"
    )
    function_call: Literal["none", "auto"] | FunctionName | None = Field(
        default=None, description="the older form of tool_choice"
    )
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        default=None, description="for models whose chat template knows it; none: without reasoning"
    )
    separate_reasoning: bool | None = Field(
        default=None,
        description="reasoning is told in reasoning_content, apart from content; false: it is part of it. Absent: as "
        "the server's [http] reasoning says",
    )
    include_reasoning: bool = Field(default=True, description="false: reasoning that is told apart is left out")

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        for old, new in (("functions", "tools"), ("function_call", "tool_choice")):
            if getattr(self, old) and getattr(self, new):
                raise InvalidRequest(f"{old}: it is the older form of {new}; one of them, not both", param=old)
        check_tools(self.dialogue, "functions" if self.functions else "tools")
        return self

    @property
    def as_functions(self) -> bool:
        """The client speaks the older form, which has one call at most."""
        return bool(self.functions)

    @property
    def dialogue(self) -> Dialogue:
        """In no dialect."""
        if self.functions:
            tools = [one.tool(f"functions.{index}") for index, one in enumerate(self.functions)]
        else:
            tools = [one.function.tool(f"tools.{index}.function") for index, one in enumerate(self.tools or ())]
        return Dialogue(
            tools,
            self._choice(),
            parallel=self.parallel_tool_calls is not False and not self.as_functions,
            reasoning=self.separate_reasoning,
            effort=self.reasoning_effort,
            choice_field="tool_choice" if self.function_call is None else "function_call",
        )

    def _choice(self) -> ToolChoice:
        choice = self.tool_choice if self.function_call is None else self.function_call
        if isinstance(choice, NamedTool):
            return ToolChoice("required", (choice.function.name,))
        if isinstance(choice, FunctionName):
            return ToolChoice("required", (choice.name,))
        if isinstance(choice, AllowedToolsChoice):
            allowed = choice.allowed_tools
            return ToolChoice(allowed.mode, tuple(dict.fromkeys(one.function.name for one in allowed.tools)))
        return ToolChoice(choice or "auto")
