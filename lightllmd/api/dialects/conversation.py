"""Messages as OpenAI's chat route has them, and how they become a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import Chat
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import Body

MAX_MESSAGES = 4096


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


Part = Annotated[TextPart | RefusalPart, Field(discriminator="type")]


class Message(Body):
    """One of a conversation."""

    lenient = True

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None

    # What an assistant's earlier answer may carry when a client sends it back, and hints for caches.
    _harmless: ClassVar[frozenset[str]] = frozenset({"name", "refusal", "annotations", "cache_control"})
    _not_yet: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": (None, []),
        "function_call": (None,),
        "audio": (None,),
    }

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.role == "assistant":
            return self
        if self.content is None:
            raise contradiction("content", f"content is required for the role {self.role!r}; it is missing or null")
        if not isinstance(self.content, str) and any(isinstance(part, RefusalPart) for part in self.content):
            raise contradiction("content", f"content: only an assistant refuses; the role is {self.role!r}")
        return self

    def plain(self) -> dict[str, Any]:
        """As a chat template takes it. An answer without content (it refused, or called a tool) is empty."""
        content: Any = self.content
        if isinstance(content, list):
            content = [{"type": "text", "text": part.text} for part in content if isinstance(part, TextPart)]
        return {"role": self.role, "content": content or ""}


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
        return Chat([message.plain() for message in messages], options)


def _message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    for name, idle in Message._not_yet.items():
        if name in message and message[name] not in idle:
            raise InvalidRequest(f"{path}.{name}: not available yet", param=f"{path}.{name}")
    if message.get("role") in ("tool", "function"):
        raise InvalidRequest(f"{path}.role: {message['role']!r} is not available yet", param=f"{path}.role")
    if isinstance(message.get("content"), list):
        for part in message["content"]:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind in ("image_url", "input_audio", "file", "video_url", "audio_url"):
                raise InvalidRequest(f"{path}.content: {kind} is not available yet", param=f"{path}.content")
            if isinstance(part, dict):
                part.pop("cache_control", None)
    dropped = Message._harmless | Message._not_yet.keys()
    return {name: value for name, value in message.items() if name not in dropped}
