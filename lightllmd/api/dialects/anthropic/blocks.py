"""The messages of a conversation in Anthropic's form, made of blocks, and the turns that they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import contradiction, shown
from lightllmd.requests.fields import Body
from lightllmd.requests.images import AskedImage, content_of, image_at, image_of_base64, unseen

MAX_MESSAGES = 4096
MAX_NAME = 256  # characters of a tool's name, and of a call's id

Turn = dict[str, Any]  # in OpenAI's form, which chat templates take

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


class Block(Body):
    """A part of a message. What has no effect here is dropped before it is checked."""

    lenient = True

    dropped: ClassVar[frozenset[str]] = frozenset({"cache_control"})


class TextBlock(Block):
    """Text."""

    dropped = Block.dropped | {"citations"}

    type: Literal["text"]
    text: str


class ImageInBody(Body):
    """An image that the request has in it."""

    lenient = True

    type: Literal["base64"]
    media_type: str = Field(default="", max_length=MAX_NAME, description="not looked at: the image says it itself")
    data: Annotated[str, Field(min_length=1)]

    def image(self, field: str) -> AskedImage:
        """In no dialect."""
        return image_of_base64(self.data, f"{field}.data")


class ImageAtUrl(Body):
    """An image elsewhere."""

    lenient = True

    type: Literal["url"]
    url: Annotated[str, Field(min_length=1)]

    def image(self, field: str) -> AskedImage:
        """In no dialect. Raises InvalidRequest."""
        return image_at(self.url, f"{field}.url")


class ImageBlock(Block):
    """An image."""

    type: Literal["image"]
    source: Annotated[ImageInBody | ImageAtUrl, Field(discriminator="type")]


class ThinkingBlock(Block):
    """Reasoning of an earlier answer. The signature is not looked at."""

    described = True

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(Block):
    """Reasoning that only the server which made it can read: the model is not shown it."""

    described = True

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Block):
    """A call of a tool in an earlier answer."""

    dropped = Block.dropped | {"caller", "toolset_name"}

    type: Literal["tool_use"]
    id: Name
    name: Name
    input: dict[str, Any]


ResultBlock = Annotated[TextBlock | ImageBlock, Field(discriminator="type")]


class ToolResultBlock(Block):
    """What a tool answered."""

    dropped = Block.dropped | {"toolset_name"}

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[ResultBlock], Field(fail_fast=True)] | None = None
    is_error: bool = False

    def shown(self, field: str) -> str | list[Any]:
        """All of it. An error says so if it says nothing."""
        content = self.content or ""
        if not isinstance(content, str):
            content = content_of(_part(block, f"{field}.content.{at}") for at, block in enumerate(content))
        return content or ("error" if self.is_error else "")


AnyBlock = Annotated[
    TextBlock | ImageBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock,
    Field(discriminator="type"),
]
_KNOWN: dict[str, type[Block]] = {
    "text": TextBlock,
    "image": ImageBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}
_ROLES: dict[str, tuple[type[Block], ...]] = {
    "user": (TextBlock, ImageBlock, ToolResultBlock),
    "assistant": (TextBlock, ThinkingBlock, RedactedThinkingBlock, ToolUseBlock),
    "system": (TextBlock,),
}
Texts = str | Annotated[list[TextBlock], Field(fail_fast=True)]


class BlockMessage(Body):
    """One of a conversation."""

    lenient = True

    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[AnyBlock], Field(fail_fast=True)]

    @model_validator(mode="after")
    def _blocks_of_its_role(self) -> Self:
        for index, block in enumerate(self.blocks):
            if not isinstance(block, _ROLES[self.role]):
                words = (
                    f"content.{index} has the type {block.type!r}, which a message of the role {self.role!r} can't have"
                )
                raise contradiction(f"content.{index}", words)
        return self

    @property
    def blocks(self) -> list[Any]:
        """Content that is a string is one block."""
        if isinstance(self.content, str):
            return [TextBlock.model_construct(type="text", text=self.content)]
        return self.content


def joined(content: Texts) -> str:
    """The text of text blocks."""
    return content if isinstance(content, str) else "\n".join(block.text for block in content)


def turns(system: Texts | None, messages: Sequence[BlockMessage]) -> list[Turn]:
    """Messages of the same role that follow each other are one turn, as Anthropic documents."""
    found: list[Turn] = []
    if system and (text := joined(system)):
        found.append({"role": "system", "content": text})
    for index, message in enumerate(messages):
        for turn in _turns(message, f"messages.{index}.content"):
            if found and found[-1]["role"] == turn["role"] != "tool":
                _add(found[-1], turn)
            else:
                found.append(turn)
    return found


def _turns(message: BlockMessage, field: str) -> Iterator[Turn]:
    if message.role == "assistant":
        yield _answer(message.blocks)
        return
    parts: list[str | AskedImage] = []
    for index, block in enumerate(message.blocks):
        if not isinstance(block, ToolResultBlock):
            parts.append(_part(block, f"{field}.{index}"))
            continue
        if parts:
            yield {"role": message.role, "content": content_of(parts)}
            parts = []
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.shown(f"{field}.{index}")}
    if parts or not message.blocks:
        yield {"role": message.role, "content": content_of(parts)}


def _part(block: TextBlock | ImageBlock, field: str) -> str | AskedImage:
    return block.text if isinstance(block, TextBlock) else block.source.image(f"{field}.source")


def _answer(blocks: Iterable[Any]) -> Turn:
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking)
        elif isinstance(block, ToolUseBlock):
            arguments = json.dumps(block.input, ensure_ascii=False)
            calls.append({"id": block.id, "type": "function", "function": {"name": block.name, "arguments": arguments}})
    turn: Turn = {"role": "assistant", "content": "\n".join(texts)}
    if any(thoughts):
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return turn


def _add(turn: Turn, following: Turn) -> None:
    if isinstance(turn["content"], list) or isinstance(following["content"], list):
        turn["content"] = [*_listed(turn["content"]), *_listed(following["content"])]
        return  # a user's
    for name in ("content", "reasoning_content"):
        texts = [text for text in (turn.get(name), following.get(name)) if text]
        if texts:
            turn[name] = "\n".join(texts)
    if "tool_calls" in following:
        turn["tool_calls"] = [*turn.get("tool_calls", ()), *following["tool_calls"]]


def _listed(content: str | list[Any]) -> list[Any]:
    if isinstance(content, list):
        return content
    return [{"type": "text", "text": content}] if content else []


# --- before the check ---------------------------------------------------------------------------------------------


def prepared(messages: Any) -> Any:
    """Without what has no effect. Raises InvalidRequest for blocks that are documented and not available here."""
    if not isinstance(messages, list):
        return messages
    return [
        message | {"content": prepared_blocks(message["content"], f"messages.{index}.content")}
        if isinstance(message, dict) and "content" in message
        else message
        for index, message in enumerate(messages)
    ]


def prepared_blocks(content: Any, path: str) -> Any:
    """The same of the content of one message, or of a system prompt."""
    if not isinstance(content, list):
        return content
    return [_prepared(block, f"{path}.{index}") for index, block in enumerate(content)]


def _prepared(block: Any, path: str) -> Any:
    if not isinstance(block, dict):
        return block
    kind = block.get("type")
    if not isinstance(kind, str):
        return block
    known = _KNOWN.get(kind)
    unseen(kind, f"{path}.type")
    if known is None:
        raise InvalidRequest(
            f"{path}.type: blocks of type {shown(kind)} are not available here; {', '.join(_KNOWN)} are",
            param=f"{path}.type",
        )
    kept = {name: value for name, value in block.items() if name not in known.dropped}
    if known is ImageBlock:
        _check_source(kept.get("source"), f"{path}.source")
    if known is ToolResultBlock and "content" in kept:
        kept["content"] = prepared_blocks(kept["content"], f"{path}.content")
    return kept


def _check_source(source: Any, path: str) -> None:
    if not isinstance(source, dict):
        return
    kind = source.get("type")
    if kind is None:
        raise InvalidRequest(f"{path}.type: required; base64 and url are known", param=f"{path}.type")
    if isinstance(kind, str) and kind not in ("base64", "url"):
        raise InvalidRequest(
            f"{path}.type: sources of type {shown(kind)} are not available here; base64 and url are",
            param=f"{path}.type",
        )
