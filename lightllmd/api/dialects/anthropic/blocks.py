"""The messages of a conversation in Anthropic's form, made of blocks, and the turns that they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import contradiction, shown
from lightllmd.requests.fields import Body

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


class ToolResultBlock(Block):
    """What a tool answered."""

    dropped = Block.dropped | {"toolset_name"}

    type: Literal["tool_result"]
    tool_use_id: Name
    content: str | Annotated[list[TextBlock], Field(fail_fast=True)] | None = None
    is_error: bool = False

    @property
    def text(self) -> str:
        """All of it. An error says so if it says nothing."""
        return joined(self.content or "") or ("error" if self.is_error else "")


AnyBlock = Annotated[
    TextBlock | ThinkingBlock | RedactedThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
_KNOWN: dict[str, type[Block]] = {
    "text": TextBlock,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedThinkingBlock,
    "tool_use": ToolUseBlock,
    "tool_result": ToolResultBlock,
}
_ROLES: dict[str, tuple[type[Block], ...]] = {
    "user": (TextBlock, ToolResultBlock),
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
    for message in messages:
        for turn in _turns(message):
            if found and found[-1]["role"] == turn["role"] != "tool":
                _add(found[-1], turn)
            else:
                found.append(turn)
    return found


def _turns(message: BlockMessage) -> Iterator[Turn]:
    if message.role == "assistant":
        yield _answer(message.blocks)
        return
    texts: list[str] = []
    for block in message.blocks:
        if isinstance(block, TextBlock):
            texts.append(block.text)
            continue
        if texts:
            yield {"role": message.role, "content": "\n".join(texts)}
            texts = []
        yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.text}
    if texts or not message.blocks:
        yield {"role": message.role, "content": "\n".join(texts)}


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
    for name in ("content", "reasoning_content"):
        texts = [text for text in (turn.get(name), following.get(name)) if text]
        if texts:
            turn[name] = "\n".join(texts)
    if "tool_calls" in following:
        turn["tool_calls"] = [*turn.get("tool_calls", ()), *following["tool_calls"]]


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
    if known is None:
        raise InvalidRequest(
            f"{path}.type: blocks of type {shown(kind)} are not available here; {', '.join(_KNOWN)} are",
            param=f"{path}.type",
        )
    kept = {name: value for name, value in block.items() if name not in known.dropped}
    if known is ToolResultBlock and "content" in kept:
        kept["content"] = prepared_blocks(kept["content"], f"{path}.content")
    return kept
