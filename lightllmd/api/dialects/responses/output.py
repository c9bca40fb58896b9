"""The output of a response: its items as they grow, and the events by which a stream tells of them.

https://platform.openai.com/docs/api-reference/responses-streaming has the events and their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightllmd.api.dialects.responses.items import Item, new_id
from lightllmd.dialogue.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning

StreamEvent = dict[str, Any]  # without its sequence_number
Logprobs = list[dict[str, Any]]
_OUTPUT_TEXT, _REASONING_TEXT, _SUMMARY = "output_text", "reasoning_text", "summary_text"


class OutputItems:
    """Of one response. An item is a message with one text, a reasoning with one text, or a call; one is open at a time.

    `items` has what was told so far; those that are closed don't change any more."""

    def __init__(self, *, summaries: bool = False) -> None:
        """`summaries`: reasoning is told as its own summary, for clients that read nothing else of it."""
        self.items: list[Item] = []
        self._summaries = summaries
        self._open: Item | None = None
        self._kind = ""  # of the text in it
        self._texts: list[str] = []
        self._logprobs: Logprobs = []

    @property
    def _index(self) -> int:
        return len(self.items) - 1

    def take(self, events: Iterable[Event], logprobs: Logprobs | None = None) -> Iterator[StreamEvent]:
        """What a stream tells of them; nothing is noted unless it is read to its end. `logprobs`: of the tokens of the
        content among them."""
        for event in events:
            match event:
                case Content():
                    yield from self._opened("message", _OUTPUT_TEXT)
                    told, logprobs = logprobs or [], None
                    self._logprobs += told
                    yield self._delta("response.output_text.delta", event.text, logprobs=told)
                case Reasoning():
                    yield from self._opened("reasoning", _SUMMARY if self._summaries else _REASONING_TEXT)
                    name = "reasoning_summary_text" if self._summaries else "reasoning_text"
                    yield self._delta(f"response.{name}.delta", event.text)
                case CallBegun():
                    yield from self.close()
                    yield self._begun(
                        {"type": "function_call", "call_id": event.id, "name": event.name, "arguments": ""}
                    )
                case CallArguments():
                    yield self._delta("response.function_call_arguments.delta", event.text)
                case CallEnded():
                    yield from self.close()

    def close(self, status: str = "completed") -> Iterator[StreamEvent]:
        """Ends the item that is open, if one is."""
        item = self._open
        if item is None:
            return
        self._open, text = None, "".join(self._texts)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            yield self._event("response.function_call_arguments.done", item, name=item["name"], arguments=text)
        else:
            part = self._part(text)
            self._parts(item).append(part)
            place = self._place
            if self._kind == _OUTPUT_TEXT:
                told = {"text": text, "logprobs": self._logprobs}
                yield self._event("response.output_text.done", item, **place, **told)
            elif self._kind == _SUMMARY:
                yield self._event("response.reasoning_summary_text.done", item, **place, text=text)
            else:
                yield self._event("response.reasoning_text.done", item, **place, text=text)
            yield self._event(f"response.{self._part_name}.done", item, **place, part=part)
        yield {"type": "response.output_item.done", "output_index": self._index, "item": item}

    def end(self, status: str = "completed") -> Iterator[StreamEvent]:
        """As `close`; an answer without anything is an empty message."""
        if not self.items:
            yield from self._opened("message", _OUTPUT_TEXT)
        yield from self.close(status)

    def broken_off(self) -> list[Item]:
        """The items as they are, with what there is of the open one; no event tells of that."""
        for _ in self.close("incomplete"):
            pass
        return self.items

    def _opened(self, item_kind: str, text_kind: str) -> Iterator[StreamEvent]:
        """Begins such an item unless it is open."""
        if self._open is not None and self._open["type"] == item_kind:
            return
        yield from self.close()
        self._kind = text_kind
        fields: dict[str, Any] = (
            {"type": "message", "role": "assistant", "content": []}
            if item_kind == "message"
            else {"type": "reasoning", "summary": [], "content": []}
        )
        yield self._begun(fields)
        yield self._event(f"response.{self._part_name}.added", self.items[-1], **self._place, part=self._part(""))

    def _begun(self, fields: dict[str, Any]) -> StreamEvent:
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[fields["type"]]
        item = {"id": new_id(prefix), "status": "in_progress"} | fields
        self.items.append(item)
        self._open, self._texts, self._logprobs = item, [], []
        told = {name: list(value) if isinstance(value, list) else value for name, value in item.items()}
        return {"type": "response.output_item.added", "output_index": self._index, "item": told}

    def _delta(self, kind: str, text: str, **more: Any) -> StreamEvent:
        self._texts.append(text)
        item = self.items[-1]
        place = {} if item["type"] == "function_call" else self._place
        return self._event(kind, item, **place, delta=text, **more)

    def _event(self, kind: str, item: Item, **fields: Any) -> StreamEvent:
        return {"type": kind, "item_id": item["id"], "output_index": self._index, **fields}

    @property
    def _place(self) -> dict[str, int]:
        return {"summary_index": 0} if self._kind == _SUMMARY else {"content_index": 0}

    @property
    def _part_name(self) -> str:
        return "reasoning_summary_part" if self._kind == _SUMMARY else "content_part"

    def _part(self, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self._kind, "text": text}
        if self._kind == _OUTPUT_TEXT:
            part |= {"annotations": [], "logprobs": self._logprobs}
        return part

    def _parts(self, item: Item) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = item["summary" if self._kind == _SUMMARY else "content"]
        return parts
