"""The items of a conversation as the Responses API has them, and the turns that they are to a chat template.

A client's items are checked by the models here and brought into one form, that of OpenAI's answers (`output` and
`/input_items`): plain dicts with an id. What is stored, told and made a prompt of is always that form.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import Body
from lightllmd.requests.images import content_of, image_at, unseen

MAX_ITEMS = 4096
MAX_ID = 128  # characters of an item's or a call's id
_LISTED = 8  # ids that a message repeats

Item = dict[str, Any]
Turn = dict[str, Any]  # a message as OpenAI's chat route has it

Identifier = Annotated[str, Field(min_length=1, max_length=MAX_ID)]
Status = Literal["in_progress", "completed", "incomplete"]


def new_id(prefix: str) -> str:
    """Of an item or a response."""
    return f"{prefix}_{uuid.uuid4().hex}"


class InputText(Body):
    """A part of a message, or of what a function returned."""

    lenient = True

    type: Literal["input_text"]
    text: str


class InputImage(Body):
    """A part of a message, or of what a function returned, that is an image."""

    lenient = True

    type: Literal["input_image"]
    image_url: Annotated[str, Field(min_length=1)] = Field(description="http, https, data: with base64, or file:")
    detail: Literal["auto", "low", "high", "original"] = Field(
        default="auto", description="without effect: the model's own processor says how large an image becomes"
    )

    def part(self) -> dict[str, Any]:
        """As an answer has it."""
        return {"type": "input_image", "detail": self.detail, "image_url": self.image_url}


class OutputText(Body):
    """A part of an answer."""

    lenient = True

    type: Literal["output_text"]
    text: str


class Refusal(Body):
    """Of an answer that said no: the model is not shown it again."""

    described = True
    lenient = True

    type: Literal["refusal"]
    refusal: str


ContentPart = Annotated[InputText | InputImage | OutputText | Refusal, Field(discriminator="type")]
OutputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


class InputMessage(Body):
    """A message of either side; without a type it is one, too."""

    lenient = True

    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)]
    id: Identifier | None = None
    status: Status | None = None

    @model_validator(mode="after")
    def _shows_nothing(self) -> Self:
        for index, part in enumerate(self.content if self.role == "assistant" else ()):
            if isinstance(part, InputImage):
                words = f"content.{index}: an assistant shows no images; the role is 'assistant'"
                raise contradiction(f"content.{index}", words)
        return self

    def item(self) -> Item:
        """As an answer has it."""
        given = self.content
        content = [self._text(given)] if isinstance(given, str) else [self._part(part) for part in given]
        content.sort(key=lambda part: bool(part["type"] == "refusal"))  # stable
        return {
            "id": self.id or new_id("msg"),
            "type": "message",
            "status": self.status or "completed",
            "role": self.role,
            "content": content,
        }

    def _part(self, part: InputText | InputImage | OutputText | Refusal) -> dict[str, Any]:
        if isinstance(part, InputImage):
            return part.part()
        return {"type": "refusal", "refusal": part.refusal} if isinstance(part, Refusal) else self._text(part.text)

    def _text(self, text: str) -> dict[str, Any]:
        if self.role == "assistant":
            return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"type": "input_text", "text": text}


class FunctionCall(Body):
    """A call that the model made."""

    lenient = True

    type: Literal["function_call"]
    call_id: Identifier
    name: Annotated[str, Field(min_length=1, max_length=MAX_ID)]
    arguments: str
    id: Identifier | None = None
    status: Status | None = None

    def item(self) -> Item:
        """As an answer has it."""
        return {
            "id": self.id or new_id("fc"),
            "type": "function_call",
            "status": self.status or "completed",
            "call_id": self.call_id,
            "name": self.name,
            "arguments": self.arguments,
        }


class FunctionCallOutput(Body):
    """What the function returned."""

    lenient = True

    type: Literal["function_call_output"]
    call_id: Identifier
    output: str | Annotated[list[OutputPart], Field(fail_fast=True)]
    id: Identifier | None = None
    status: Status | None = None

    def item(self) -> Item:
        """As an answer has it."""
        output = self.output
        return {
            "id": self.id or new_id("fco"),
            "type": "function_call_output",
            "status": self.status or "completed",
            "call_id": self.call_id,
            "output": output
            if isinstance(output, str)
            else [
                part.part() if isinstance(part, InputImage) else {"type": "input_text", "text": part.text}
                for part in output
            ],
        }


class SummaryText(Body):
    """A part of a summary."""

    lenient = True

    type: Literal["summary_text"]
    text: str


class ReasoningText(Body):
    """A part of the reasoning itself."""

    lenient = True

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Body):
    """What the model said before its answer. `encrypted_content` is passed over: none is made here."""

    described = True
    lenient = True

    type: Literal["reasoning"]
    summary: Annotated[list[SummaryText], Field(fail_fast=True)] = []
    content: Annotated[list[ReasoningText], Field(fail_fast=True)] | None = None
    encrypted_content: str | None = None
    id: Identifier | None = None
    status: Status | None = None

    def item(self) -> Item:
        """As an answer has it."""
        return {
            "id": self.id or new_id("rs"),
            "type": "reasoning",
            "status": self.status or "completed",
            "summary": [{"type": "summary_text", "text": part.text} for part in self.summary],
            "content": [{"type": "reasoning_text", "text": part.text} for part in self.content or ()],
        }


class ItemReference(Body):
    """Stands for an item of a stored response."""

    described = True
    lenient = True

    type: Literal["item_reference"]
    id: Identifier

    def item(self) -> Item:
        """Itself: the item is looked up where the store is."""
        return {"type": "item_reference", "id": self.id}


InputItem = Annotated[
    InputMessage | FunctionCall | FunctionCallOutput | ReasoningItem | ItemReference, Field(discriminator="type")
]
Items = Annotated[list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True)]

_ITEMS = frozenset({"message", "function_call", "function_call_output", "reasoning", "item_reference"})
_PARTS = frozenset({"input_text", "input_image", "output_text", "refusal"})


def prepared(given: Any) -> Any:
    """The `input` of a body with the type of each item said. Raises InvalidRequest, with its place, for an item or a
    part that is of a kind of OpenAI's that there is not here."""
    if not isinstance(given, list):
        return given
    return [_prepared(item, f"input.{index}") for index, item in enumerate(given)]


def _prepared(item: Any, path: str) -> Any:
    if not isinstance(item, dict):
        return item
    kind = item.get("type")
    if kind is None and "role" in item:
        kind = "message"
    elif kind is None and "id" in item and len(item) == 1:
        kind = "item_reference"
    if isinstance(kind, str) and kind not in _ITEMS:
        raise InvalidRequest(
            f"{path}.type: {kind[:MAX_ID]!r} is not available here; items are {', '.join(sorted(_ITEMS))}",
            param=f"{path}.type",
        )
    for field in ("content", "output"):
        parts = item.get(field)
        for index, part in enumerate(parts if isinstance(parts, list) and kind != "reasoning" else ()):
            if isinstance(part, dict):
                _check_part(part, f"{path}.{field}.{index}")
    return item | {"type": kind} if kind is not None else item


def _check_part(part: dict[str, Any], path: str) -> None:
    kind, where = part.get("type"), f"{path}.type"
    unseen(kind, where)
    if isinstance(kind, str) and kind not in _PARTS:
        raise InvalidRequest(f"{where}: {kind[:MAX_ID]!r} is not available here; text and images are", param=where)
    if kind == "input_image" and part.get("file_id") is not None:
        where = f"{path}.file_id"
        raise InvalidRequest(f"{where}: there are no files here; image_url is what an image has", param=where)


def resolved(items: Sequence[Item], stored: Callable[[str], Item | None]) -> list[Item]:
    """With the items that references stand for. Raises InvalidRequest for one that is not stored."""
    found: list[Item] = []
    for index, item in enumerate(items):
        if item["type"] == "item_reference":
            referred = stored(item["id"])
            if referred is None:
                raise InvalidRequest(
                    f"input.{index}.id: Item with id '{item['id']}' not found.", param=f"input.{index}.id"
                )
            item = referred
        found.append(item)
    return found


def turns(instructions: str | None, items: Iterable[Item]) -> list[Turn]:
    """The messages of a chat. Reasoning, text and calls that follow each other are one answer of the model.

    Raises InvalidRequest for an output of a call that there is not."""
    said: list[Turn] = [] if instructions is None else [{"role": "system", "content": instructions}]
    answer: Turn | None = None  # the model's, while it goes on
    names: dict[str, str] = {}  # of functions, by the id of the call
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            answer = None
            said.append(_result(item, names))
            continue
        if kind == "message" and item["role"] != "assistant":
            answer = None
            content = _content(item["content"])
            one = instructions is not None and len(said) == 1 and item["role"] != "user"
            if one and isinstance(content, str):
                said[0]["content"] += f"\n\n{content}"  # many templates take one system message only
            else:
                said.append({"role": item["role"], "content": content})
            continue
        if answer is None or not _goes_on(answer, kind):
            answer = {"role": "assistant", "content": ""}
            said.append(answer)
        if kind == "message":
            answer["content"] = _texts(item["content"])
        elif kind == "reasoning":
            answer["reasoning_content"] = "".join(part["text"] for part in item.get("content") or item["summary"])
        else:
            names[item["call_id"]] = item["name"]
            answer["content"] = answer["content"] or None
            function = {"name": item["name"], "arguments": item["arguments"]}
            answer.setdefault("tool_calls", []).append(
                {"id": item["call_id"], "type": "function", "function": function}
            )
    return said


def _goes_on(answer: Turn, kind: str) -> bool:
    """Whether an item of that kind belongs to the answer so far: reasoning begins one, text comes before calls."""
    if kind == "function_call":
        return True
    return kind == "message" and not answer["content"] and "tool_calls" not in answer


def _result(item: Item, names: dict[str, str]) -> Turn:
    call = item["call_id"]
    if call not in names:
        raise InvalidRequest(f"No tool call found for function call output with call_id {call}.", param="input")
    output = item["output"]
    content = output if isinstance(output, str) else _content(output)
    return {"role": "tool", "tool_call_id": call, "name": names[call], "content": content}


def _texts(parts: Sequence[dict[str, Any]]) -> str:
    return "\n".join(part["text"] for part in parts if "text" in part)


def _content(parts: Sequence[dict[str, Any]]) -> str | list[Any]:
    """Of a message that is no answer. A refusal is not shown again."""
    return content_of(
        image_at(part["image_url"], "input") if part["type"] == "input_image" else part["text"]
        for part in parts
        if part["type"] != "refusal"
    )
