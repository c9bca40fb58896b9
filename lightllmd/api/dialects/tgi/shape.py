"""How Text Generation Inference shows what was generated: whole, with details, and token by token in a stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from lightllmd.api.dialects.tgi.errors import broken_off, error_frame
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.event_stream import Frames
from lightllmd.api.inflight.pending import Pending
from lightllmd.errors import RequestError
from lightllmd.requests.branch import Branch
from lightllmd.requests.prompt_log import FLOOR
from lightllmd.text.interface import Tokenizer

_json = msgspec.json.Encoder()


class ToldToken(msgspec.Struct):
    """A generated one. The texts of those that are not special add up to the generated text."""

    id: int
    text: str
    logprob: float
    special: bool


class PrefillToken(msgspec.Struct):
    """One of the prompt."""

    id: int
    text: str
    logprob: float | None  # None: the first, which has none


class StreamDetails(msgspec.Struct):
    """Of the last event."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class TokenEvent(msgspec.Struct):
    """One token of a stream; the last has the text and the details."""

    index: int  # of the token, from 1
    token: ToldToken
    top_tokens: list[ToldToken] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


@dataclass(frozen=True)
class Shown:
    """What of a sequence is shown, and how."""

    tokenizer: Tokenizer
    prompt: str  # what each text begins with
    detailed: bool
    top_tokens: int
    seed: int | None  # that the first sequence was drawn with; None: none was drawn
    beams: bool

    def answer(self, entry: Entry) -> dict[str, Any]:
        """In one piece: the likeliest sequence per token; the others are told in its details."""
        best, *others = self.ranked(entry)
        answer: dict[str, Any] = self._text_of(best)
        if self.detailed:
            prefill = self._prefill(entry)
            answer["details"] = details = self._sequence(best, prefill)
            if others:
                details["best_of_sequences"] = [
                    self._text_of(branch) | self._sequence(branch, prefill) for branch in others
                ]
        return answer

    def ranked(self, entry: Entry) -> list[Branch]:
        """The best one, then the others in their order."""
        branches = list(entry.branches)
        if not self.beams:  # which are in their order
            means = [branch.cumulative_logprob / max(1, len(branch.ids)) for branch in branches]
            branches.insert(0, branches.pop(max(range(len(branches)), key=means.__getitem__)))
        return branches

    def _text_of(self, branch: Branch) -> dict[str, Any]:
        return {"generated_text": self.prompt + branch.text}

    def _sequence(self, branch: Branch, prefill: list[PrefillToken]) -> dict[str, Any]:
        """What `details` and each of `best_of_sequences` tell."""
        count = len(branch.ids)
        told = {
            "finish_reason": finish_reason(branch),
            "generated_tokens": count,
            "seed": self.seed_of(branch),
            "prefill": prefill,
            "tokens": [self.token(branch, index) for index in range(count)],
        }
        if self.top_tokens:
            told["top_tokens"] = [self.top(branch, index) for index in range(count)]
        return told

    def seed_of(self, branch: Branch) -> int | None:
        """The seed that gives this sequence by itself; None: it was not drawn, or is another one of best_of."""
        return None if branch.index else self.seed

    def _prefill(self, entry: Entry) -> list[PrefillToken]:
        if entry.params.prompt_logprobs < 0:
            return []
        logprobs: list[float | None] = [None, *(max(logprob, FLOOR) for logprob in entry.prompt_log.logprobs)]
        return [
            PrefillToken(token, self._text(token), logprob)
            for token, logprob in zip(entry.prompt_ids, logprobs, strict=True)
        ]

    def token(self, branch: Branch, index: int) -> ToldToken:
        """The one that was generated there."""
        token = branch.ids[index]
        hidden = branch.unshown.get(token)
        text = branch.texts[index] if hidden is None else hidden
        return ToldToken(token, text, max(branch.logprobs[index], FLOOR), hidden is not None)

    def top(self, branch: Branch, index: int) -> list[ToldToken]:
        """The likeliest there."""
        unshown = branch.unshown
        return [
            ToldToken(token, self._text(token), max(logprob, FLOOR), token in unshown)
            for token, logprob in (branch.alternatives[index] or [])[: self.top_tokens]
        ]

    def _text(self, token: int) -> str:
        """Of a token by itself."""
        raw = self.tokenizer.token_bytes(token)
        return self.tokenizer.id_to_token(token) or "" if raw is None else raw.decode("utf-8", "replace")


def finish_reason(branch: Branch) -> str:
    """Of a sequence that has ended."""
    if branch.finish == "stop":
        return "stop_sequence" if branch.stopped else "eos_token"
    return "length"


class EventFrames(Frames):
    """An event for each token of the only sequence."""

    def __init__(self, pending: Pending, shown: Shown) -> None:
        self._pending = pending
        self._entry = pending.entries[0]
        self._branch = self._entry.branches[0]
        self._shown = shown
        self._sent = 0

    def take(self) -> bytes:
        branch, shown = self._branch, self._shown
        first, count = self._sent, len(branch.ids)
        self._sent = count
        ended = branch.finish is not None and branch.finish != "abort"
        events = []
        for index in range(first, count):
            event = TokenEvent(index + 1, shown.token(branch, index))
            if shown.top_tokens:
                event.top_tokens = shown.top(branch, index)
            if ended and index + 1 == count:
                event.generated_text = shown.prompt + branch.text
                event.details = self._details() if shown.detailed else None
            events.append(b"data:%b\n\n" % _json.encode(event))
        return b"".join(events)

    def _details(self) -> StreamDetails:
        entry, branch = self._entry, self._branch
        return StreamDetails(finish_reason(branch), len(branch.ids), self._shown.seed_of(branch), entry.prompt_tokens)

    def end(self) -> bytes:
        return broken_off(self._pending.error) if self._branch.finish == "abort" else b""

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)
