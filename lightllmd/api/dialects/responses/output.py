"""The output of a response: its items as they grow, and the events by which a stream tells of them.

https://platform.openai.com/docs/api-reference/responses-streaming has the events and their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightllmd.api.dialects.responses.items import Item, new_id
from lightllmd.dialogue.events import CallArguments, CallBegun, Content, Event, Reasoning

StreamEvent = dict[str, Any]  # without its sequence_number
Logprobs = list[dict[str, Any]]
# Kinds of text, as parts are called; a call's has no part.
_OUTPUT_TEXT, _REASONING_TEXT, _SUMMARY, _ARGUMENTS = "output_text", "reasoning_text", "summary_text", "arguments"
_NAMES = {  # in events
    _OUTPUT_TEXT: "output_text",
    _REASONING_TEXT: "reasoning_text",
    _SUMMARY: "reasoning_summary_text",
    _ARGUMENTS: "function_call_arguments",
}
_PARTS = {_OUTPUT_TEXT: "content_part", _REASONING_TEXT: "content_part", _SUMMARY: "reasoning_summary_part"}
_PLACES: dict[str, dict[str, int]] = {  # of the only part
    _OUTPUT_TEXT: {"content_index": 0},
    _REASONING_TEXT: {"content_index": 0},
    _SUMMARY: {"summary_index": 0},
    _ARGUMENTS: {},
}


class OutputItems:
    """Of one response. An item is a message with one text, a reasoning with one text, or a call; one is open at a time.

    `items` has what was told so far; those that are closed don't change any more."""

    def __init__(self, *, summaries: bool = False) -> None:
        """`summaries`: reasoning is told as its own summary, for clients that read nothing else of it."""
        self.items: list[Item] = []
        self._reasoning_kind = _SUMMARY if summaries else _REASONING_TEXT
        self._open: Item | None = None
        self._kind = ""  # of the text in it; empty: none is open
        self._delta_head: StreamEvent = {}  # what each delta of the open item begins with
        self._texts: list[str] = []
        self._logprobs: Logprobs = []

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def take(self, events: Iterable[Event], logprobs: Logprobs | None = None) -> Iterator[StreamEvent]:
        """What a stream tells of them; nothing is noted unless it is read to its end. `logprobs`: of the tokens of the
        content among them."""
        for event in events:
            if isinstance(event, Content | Reasoning):
                kind = _OUTPUT_TEXT if isinstance(event, Content) else self._reasoning_kind
                if self._kind != kind:
                    yield from self._opened(kind)
                self._texts.append(event.text)
                if kind == _OUTPUT_TEXT:
                    told, logprobs = logprobs or [], None
                    self._logprobs += told
                    yield {**self._delta_head, "delta": event.text, "logprobs": told}
                else:
                    yield {**self._delta_head, "delta": event.text}
            elif isinstance(event, CallArguments):
                self._texts.append(event.text)
                yield {**self._delta_head, "delta": event.text}
            elif isinstance(event, CallBegun):
                yield from self.close()
                yield self._begun(
                    _ARGUMENTS, {"type": "function_call", "call_id": event.id, "name": event.name, "arguments": ""}
                )
            else:
                yield from self.close()

    def close(self, status: str = "completed") -> Iterator[StreamEvent]:
        """Ends the item that is open, if one is."""
        item = self._open
        if item is None:
            return
        kind, text = self._kind, "".join(self._texts)
        self._open, self._kind = None, ""
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", item, name=item["name"], arguments=text)
        else:
            part = self._part(kind, text)
            item["summary" if kind == _SUMMARY else "content"].append(part)
            place = _PLACES[kind]
            told = {"logprobs": self._logprobs} if kind == _OUTPUT_TEXT else {}
            yield self._event(f"response.{_NAMES[kind]}.done", item, **place, text=text, **told)
            yield self._event(f"response.{_PARTS[kind]}.done", item, **place, part=part)
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}

    def end(self, status: str = "completed") -> Iterator[StreamEvent]:
        """As `close`; an answer without anything is an empty message."""
        if not self.items:
            yield from self._opened(_OUTPUT_TEXT)
        yield from self.close(status)

    def broken_off(self) -> list[Item]:
        """The items as they are, with what there is of the open one; no event tells of that."""
        for _ in self.close("incomplete"):
            pass
        return self.items

    def _opened(self, kind: str) -> Iterator[StreamEvent]:
        """Begins an item with such a text."""
        yield from self.close()
        fields: dict[str, Any] = (
            {"type": "message", "role": "assistant", "content": []}
            if kind == _OUTPUT_TEXT
            else {"type": "reasoning", "summary": [], "content": []}
        )
        yield self._begun(kind, fields)
        part = self._part(kind, "")
        yield self._event(f"response.{_PARTS[kind]}.added", self.items[-1], **_PLACES[kind], part=part)

    def _begun(self, kind: str, fields: dict[str, Any]) -> StreamEvent:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[fields["type"]]
        item = {"id": new_id(prefix), "status": "in_progress"} | fields
        self.items.append(item)
        self._open, self._kind, self._texts, self._logprobs = item, kind, [], []
        self._delta_head = self._event(f"response.{_NAMES[kind]}.delta", item, **_PLACES[kind])
        told = {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
        return {"type": "response.output_item.added", "output_index": self._index, "item": told}

    def _event(self, kind: str, item: Item, **fields: Any) -> StreamEvent:
        return {"type": kind, "item_id": item["id"], "output_index": self._index, **fields}

    def _part(self, kind: str, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": kind, "text": text}
        if kind == _OUTPUT_TEXT:
            part |= {"annotations": [], "logprobs": self._logprobs}
        return part
