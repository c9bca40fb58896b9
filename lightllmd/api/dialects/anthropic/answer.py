"""What /v1/messages answers: a message of blocks, whole or in the events of a stream."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from pydantic_core import from_json

from lightllmd.api.dialects.anthropic.errors import error_frame
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.event_stream import Frames
from lightllmd.api.inflight.pending import Pending
from lightllmd.dialogue.events import CallArguments, CallBegun, CallEnded, Content, Event, Reasoning, merged
from lightllmd.dialogue.transcript import Transcript
from lightllmd.errors import RequestError, RequestFailed

_WAITING = 256  # times what waits of a call's arguments: it is told when that is more than what was told
_json = msgspec.json.Encoder()
_TEXT = (
    b"event: content_block_delta\n"
    b'data: {"type":"content_block_delta","index":%d,"delta":{"type":"text_delta","text":%b}}\n\n'
)
PING = b'event: ping\ndata: {"type":"ping"}\n\n'


@dataclass(frozen=True)
class MessageHead:
    """What an answer says beside its blocks."""

    id: str
    model: str
    max_tokens: int  # as asked for
    shows_thinking: bool  # False: thinking blocks are empty

    def message(self, content: list[dict[str, Any]], stop: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        """Anthropic's Message."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            **stop,
            "usage": usage,
        }

    def stop(self, entry: Entry, transcript: Transcript) -> dict[str, Any]:
        """Why the answer ends."""
        branch = entry.branches[0]
        if branch.finish == "length":
            room = entry.params.max_new_tokens < self.max_tokens
            reason = "model_context_window_exceeded" if room else "max_tokens"
        elif branch.stopped_by is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": branch.stopped_by}
        else:
            reason = "tool_use" if transcript.calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}


def usage(entry: Entry, transcript: Transcript) -> dict[str, Any]:
    """Tokens read from the prompt cache are no input tokens, as Anthropic counts."""
    counts: dict[str, Any] = {
        "input_tokens": max(0, entry.prompt_tokens - entry.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": entry.cached,
        "output_tokens": entry.generated,
    }
    if transcript.reasoning_tokens:
        counts["output_tokens_details"] = {"thinking_tokens": transcript.reasoning_tokens}
    return counts


def _signature(digest: Any) -> str:
    """Of a thinking block, which clients want to send back. It says nothing: none is checked."""
    return base64.b64encode(digest.digest()).decode()


# --- in one piece -------------------------------------------------------------------------------------------------


def blocks(events: Iterable[Event], shows_thinking: bool) -> list[dict[str, Any]]:
    """The content of a message."""
    found: list[dict[str, Any]] = []
    inputs: list[tuple[dict[str, Any], str]] = []
    for event in merged(events):
        match event:
            case Content(text):
                found.append({"type": "text", "text": text})
            case Reasoning(text):
                signature = _signature(hashlib.sha256(text.encode("utf-8", "replace")))
                found.append({"type": "thinking", "thinking": text if shows_thinking else "", "signature": signature})
            case CallBegun(_, name_of_call, name):
                found.append({"type": "tool_use", "id": name_of_call, "name": name, "input": {}})
            case CallArguments(_, text):
                inputs.append((found[-1], text))
    for block, text in inputs:
        block["input"] = _input(text)
    return found


def _input(arguments: str) -> dict[str, Any]:
    """Of a call that was cut off, or is no JSON from some place on, what is there before, as Anthropic's clients read a
    stream; what is no object is none."""
    sound = arguments[: _sound(arguments)]
    return dict(from_json(sound, allow_partial="trailing-strings")) if sound else {}


def _sound(arguments: str) -> int:
    """How many characters can be the beginning of a JSON object. Clients fail at what is none."""
    if _begins_object(arguments):
        return len(arguments)
    good, bad = 0, len(arguments)
    while bad - good > 1:
        middle = (good + bad) // 2
        if _begins_object(arguments[:middle]):
            good = middle
        else:
            bad = middle
    return good


def _begins_object(text: str) -> bool:
    try:
        return isinstance(from_json(text, allow_partial=True), dict)
    except ValueError:
        return False


class _Arguments:
    """Of the call that is open: the stream has no more of them than can be the beginning of an object.

    They are checked from their beginning, so pieces of long ones wait for each other: linear in all."""

    def __init__(self) -> None:
        self._told = ""
        self._waiting = ""
        self._broken = False

    def add(self, text: str) -> str:
        """What can be told now."""
        self._waiting += text
        return self.flush() if len(self._waiting) * _WAITING >= len(self._told) else ""

    def flush(self) -> str:
        """What waits."""
        if self._broken:
            return ""
        whole = self._told + self._waiting
        told = whole[: _sound(whole)]
        self._broken = len(told) < len(whole) and bool(whole.strip())
        piece, self._told, self._waiting = told[len(self._told) :], told, "" if told else self._waiting
        return piece


# --- as a stream --------------------------------------------------------------------------------------------------


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), _json.encode({"type": name, **fields}))


class Blocks:
    """The events of the blocks of one answer, which come one after the other."""

    def __init__(self, shows_thinking: bool) -> None:
        self._shows_thinking = shows_thinking
        self._index = -1  # of the block that is open, or was last
        self._open: type[Event] | None = None  # what it is made of
        self._digest = hashlib.sha256()  # of a thinking block
        self._arguments = _Arguments()  # of a call

    def take(self, events: Iterable[Event]) -> bytes:
        """The frames of what came."""
        return b"".join(frame for event in events for frame in self._frames(event))

    def _frames(self, event: Event) -> Iterable[bytes]:
        match event:
            case Content(text):
                yield from self._begin(Content, {"type": "text", "text": ""})
                yield _TEXT % (self._index, _json.encode(text))
            case Reasoning(text):
                yield from self._begin(Reasoning, {"type": "thinking", "thinking": "", "signature": ""})
                self._digest.update(text.encode("utf-8", "replace"))
                if self._shows_thinking:
                    yield self._delta({"type": "thinking_delta", "thinking": text})
            case CallBegun(_, id_of_call, name):
                yield self.close()
                yield from self._begin(CallBegun, {"type": "tool_use", "id": id_of_call, "name": name, "input": {}})
            case CallArguments(_, text):
                yield self._input(self._arguments.add(text))
            case CallEnded():
                yield self.close()

    def _input(self, text: str) -> bytes:
        return self._delta({"type": "input_json_delta", "partial_json": text}) if text else b""

    def _begin(self, kind: type[Event], block: dict[str, Any]) -> Iterable[bytes]:
        if self._open is kind:
            return
        yield self.close()
        self._open = kind
        self._index += 1
        self._digest, self._arguments = hashlib.sha256(), _Arguments()
        yield _event("content_block_start", index=self._index, content_block=block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)

    def close(self) -> bytes:
        """The end of the block that is open, if one is."""
        if self._open is None:
            return b""
        rest = b""
        if self._open is CallBegun:
            rest = self._input(self._arguments.flush())
        elif self._open is Reasoning:
            rest = self._delta({"type": "signature_delta", "signature": _signature(self._digest)})
        self._open = None
        return rest + _event("content_block_stop", index=self._index)


class MessageEvents(Frames):
    """The frames of a stream."""

    def __init__(self, pending: Pending, head: MessageHead, transcript: Transcript) -> None:
        self._pending = pending
        self._entry = pending.entries[0]
        self._head = head
        self._transcript = transcript
        self._blocks = Blocks(head.shows_thinking)
        self._begun = False

    def take(self) -> bytes:
        if not self._entry.branches[0].ids:
            return b""
        return self._start() + self._blocks.take(self._transcript.take())

    def _start(self) -> bytes:
        if self._begun:
            return b""
        self._begun = True
        begun = self._usage() | {"output_tokens": min(1, self._entry.generated)}
        message = self._head.message([], {"stop_reason": None, "stop_sequence": None}, begun)
        return _event("message_start", message=message)

    def end(self) -> bytes:
        if self._pending.aborted:
            return _broken_off(self._pending.error)
        last = self._start() + self._blocks.take(self._transcript.take()) + self._blocks.close()
        stop = self._head.stop(self._entry, self._transcript)
        return last + _event("message_delta", delta=stop, usage=self._usage()) + _event("message_stop")

    def _usage(self) -> dict[str, Any]:
        return usage(self._entry, self._transcript)

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)

    def idle(self, comment: bytes) -> bytes:
        return PING if self._begun else comment


def _broken_off(error: RequestError | None) -> bytes:
    """The end of a stream whose answer is broken off from our side, with some of it told."""
    return error_frame(error or RequestFailed("the answer was broken off"))
