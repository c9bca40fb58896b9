"""Messages as OpenAI's chat route has them, and how they become a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import Chat
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import Body
from lightllmd.requests.images import image_at, unseen

MAX_MESSAGES = 4096
MAX_CALLS = 128  # of one message


class TextPart(Body):
    """A part of a message that is text."""

    lenient = True

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """Of an answer that said no: the model is not shown it again."""

    described = True
    lenient = True

    type: Literal["refusal"]
    refusal: str


class ImageUrl(Body):
    """Where an image is."""

    lenient = True

    url: Annotated[str, Field(min_length=1)] = Field(description="http, https, data: with base64, or file:")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        default=None, description="without effect: the model's own processor says how large an image becomes"
    )


class ImageUrlPart(Body):
    """A part of a message that is an image."""

    lenient = True

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | RefusalPart | ImageUrlPart, Field(discriminator="type")]


class CalledFunction(Body):
    """What an assistant called, and with what."""

    lenient = True

    name: Annotated[str, Field(min_length=1, max_length=256)]
    arguments: str = "{}"


class ToolCall(Body):
    """One call of an assistant's message."""

    lenient = True

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One of a conversation."""

    lenient = True

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        default=None, description="of an assistant: what it called"
    )
    tool_call_id: str | None = Field(default=None, description="of a tool: the call that this is the result of")
    function_call: CalledFunction | None = Field(default=None, description="the older form of tool_calls")
    reasoning_content: str | None = Field(
        default=None, description="of an assistant: what it thought, for templates that show it again"
    )
    reasoning: str | None = Field(default=None, description="another name of reasoning_content")

    # What an assistant's earlier answer may carry when a client sends it back, and hints for caches.
    _harmless: ClassVar[frozenset[str]] = frozenset({"refusal", "annotations", "cache_control"})
    _not_yet: ClassVar[dict[str, tuple[Any, ...]]] = {"audio": (None,)}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role != "assistant":
            self._has_content()
            for field in ("tool_calls", "function_call"):
                if getattr(self, field):
                    raise contradiction(field, f"{field}: only an assistant calls; the role is {self.role!r}")
        if self.role == "tool" and not self.tool_call_id:
            raise contradiction("tool_call_id", "tool_call_id is required for the role 'tool'; it is missing or empty")
        if self.role == "function" and not self.name:
            raise contradiction("name", "name is required for the role 'function'; it is missing or empty")
        return self

    def _has_content(self) -> None:
        if self.content is None:
            raise contradiction("content", f"content is required for the role {self.role!r}; it is missing or null")
        if not isinstance(self.content, str) and any(isinstance(part, RefusalPart) for part in self.content):
            raise contradiction("content", f"content: only an assistant refuses; the role is {self.role!r}")

    @model_validator(mode="after")
    def _shows_nothing(self) -> Self:
        parts = self.content if self.role == "assistant" and isinstance(self.content, list) else ()
        if any(isinstance(part, ImageUrlPart) for part in parts):
            raise contradiction("content", "content: an assistant shows no images; the role is 'assistant'")
        return self

    @property
    def calls(self) -> list[ToolCall]:
        """Those of an assistant, in either form; the older one has no ids."""
        if self.function_call is not None and not self.tool_calls:
            return [ToolCall(id=f"call_{self.function_call.name}", function=self.function_call)]
        return self.tool_calls or []

    @property
    def answers(self) -> str | None:
        """The id of the call that this is the result of."""
        return f"call_{self.name}" if self.role == "function" else self.tool_call_id

    def plain(self, field: str) -> dict[str, Any]:
        """As `Chat.of` takes it. An answer without content is empty, but null where it called a tool. `field`: the
        message's own."""
        content: Any = self.content
        if isinstance(content, list):
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else image_at(part.image_url.url, f"{field}.content.{index}.image_url.url")
                for index, part in enumerate(content)
                if not isinstance(part, RefusalPart)
            ]
        calls = self.calls
        plain: dict[str, Any] = {"role": self.role, "content": content or (None if calls else "")}
        if calls:
            plain["tool_calls"] = [call.model_dump() for call in calls]
        if self.role in ("tool", "function"):
            plain |= {"role": "tool", "tool_call_id": self.answers}
        if self.role in ("tool", "function") and self.name:
            plain["name"] = self.name
        thought = self.reasoning_content or self.reasoning
        if thought and self.role == "assistant":
            plain["reasoning_content"] = thought
        return plain


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class Conversation(Body):
    """How messages become a prompt; vLLM's fields, which clients send to any server."""

    add_generation_prompt: bool | None = Field(
        default=None, description="whether the prompt ends with the head of an answer; absent: unless one is continued"
    )
    continue_final_message: bool = Field(
        default=False, description="the answer goes on with the last message instead of beginning one"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="further names for the model's chat template, such as enable_thinking"
    )

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        body = super().prepare(body)
        messages = body.get("messages")
        if isinstance(messages, list):
            messages = [_message(message, f"messages.{index}") for index, message in enumerate(messages)]
            return body | {"messages": messages}
        return body

    @model_validator(mode="after")
    def _begins_or_continues(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise contradiction(
                "add_generation_prompt", "add_generation_prompt should be false with continue_final_message; got true"
            )
        return self

    def chat(self, messages: Sequence[Message]) -> Chat:
        """As the model's template takes it."""
        options = {
            "add_generation_prompt": self.add_generation_prompt is not False,
            "continue_final_message": self.continue_final_message,
            "variables": self.chat_template_kwargs,
        }
        return Chat.of([message.plain(f"messages.{index}") for index, message in enumerate(messages)], options)


def check_answers(messages: Sequence[Message], field: str = "messages") -> None:
    """Raises InvalidRequest for the result of a call that no message before it made."""
    called: set[str] = set()
    for index, message in enumerate(messages):
        called.update(call.id for call in message.calls)
        if (answered := message.answers) is not None and message.role in ("tool", "function"):
            path = f"{field}.{index}.{'name' if message.role == 'function' else 'tool_call_id'}"
            if answered not in called:
                told = answered.removeprefix("call_") if message.role == "function" else answered
                raise InvalidRequest(f"{path}: no message before it made the call {told[:80]!r}", param=path)


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    for name, idle in Message._not_yet.items():
        if name in message and message[name] not in idle:
            raise InvalidRequest(f"{path}.{name}: not available yet", param=f"{path}.{name}")
    if isinstance(message.get("content"), list):
        for index, part in enumerate(message["content"]):
            if isinstance(part, dict):
                _check_part(part, f"{path}.content.{index}")
                part.pop("cache_control", None)
    dropped = Message._harmless | Message._not_yet.keys()
    return {name: value for name, value in message.items() if name not in dropped}


def _check_part(part: dict[str, Any], path: str) -> None:
    """Brings vLLM's short form of an image into OpenAI's. Raises InvalidRequest for kinds that there are not here."""
    kind = part.get("type")
    unseen(kind, f"{path}.type")
    if kind == "file":
        raise InvalidRequest(f"{path}.type: file is not available here; text and image_url are", param=f"{path}.type")
    if kind == "image_url" and isinstance(part.get("image_url"), str):
        part["image_url"] = {"url": part["image_url"]}
