"""How OpenAI's two routes show a sequence: whole, in chunks of a stream, and with log-probabilities."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lightllmd.api.dialects.openai.bodies import UsageTold
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.event_stream import DONE, Frames
from lightllmd.api.web.errors import openai_error
from lightllmd.errors import RequestError
from lightllmd.requests.branch import Branch
from lightllmd.text.interface import Tokenizer

_json = msgspec.json.Encoder()


class Choice:
    """One sequence of the answer, and how much of it a stream has sent."""

    __slots__ = ("begun", "branch", "decoded", "entry", "finished", "index", "prompt", "sent")

    def __init__(self, index: int, prompt: int, entry: Entry, branch: Branch) -> None:
        self.index = index
        self.prompt = prompt  # the number of its prompt in the body
        self.entry = entry
        self.branch = branch
        self.sent = 0  # tokens
        self.decoded = 0  # characters that the tokens whose log-probabilities were shown have
        self.begun = False
        self.finished = False


def _generated(entries: Sequence[Entry]) -> int:
    return sum(entry.generated for entry in entries)


def usage(entries: Sequence[Entry], completion: int) -> dict[str, Any]:
    """`completion`: tokens generated for them, as far as the client knows of them."""
    prompt = sum(entry.prompt_tokens for entry in entries)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(entry.cached for entry in entries)},
    }


def numbered(token: int) -> str:
    """As vLLM names tokens by their ids."""
    return f"token_id:{token}"


@dataclass(frozen=True)
class Details:
    """What an answer shows of tokens."""

    alternatives: int | None  # per token; None: no log-probabilities at all
    scores_prompt: bool  # an answer in one piece has the prompt's log-probabilities, in a field of their own
    token_ids: bool = False
    numbered: bool = False  # log-probabilities call tokens by their ids
    fingerprint: str | None = None  # the `system_fingerprint`; None: there is none
    as_tgi: bool = False  # a stream is as that of TGI: every delta has a role and tool calls, no [DONE] ends it


class Shape(ABC):
    """What the two routes differ in."""

    object: str
    chunk_object: str

    def __init__(self, answer_id: str, model: str, tokenizer: Tokenizer, details: Details) -> None:
        self.id = answer_id
        self.model = model
        self.created = int(time.time())
        self._tokenizer = tokenizer
        self._details = details
        self._alternatives = details.alternatives

    def answer(self, choices: Sequence[Choice], entries: Sequence[Entry]) -> dict[str, Any]:
        """In one piece."""
        return {
            **self.head(self.object),
            "choices": [self.whole(choice) for choice in choices],
            "usage": self.usage(entries, _generated(entries)),
        }

    def usage(self, entries: Sequence[Entry], completion: int) -> dict[str, Any]:
        """See the function of this name."""
        return usage(entries, completion)

    def head(self, kind: str) -> dict[str, Any]:
        """What an answer or a chunk begins with. `kind`: its `object`."""
        told = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        fingerprint = self._details.fingerprint
        return told if fingerprint is None else told | {"system_fingerprint": fingerprint}

    @property
    def done(self) -> bytes:
        """What a stream ends with."""
        return b"" if self._details.as_tgi else DONE

    @abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """An entry of `choices` of such an answer."""

    @abstractmethod
    def pieces(self, choice: Choice) -> Iterable[dict[str, Any]]:
        """The entries of `choices`, one per chunk, for what the sequence gained; marks as sent what each one shows."""

    def first_chunk(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """What the first chunk of a stream has beside its choice."""
        return {}

    def ids(self, ids: Sequence[int]) -> dict[str, Any]:
        """vLLM's extension, of a choice."""
        return {"token_ids": ids} if self._details.token_ids else {}

    def token_text(self, token: int) -> str:
        """What a token is called in log-probabilities where several may have one name."""
        if self._details.numbered:
            return numbered(token)
        raw = self._tokenizer.token_bytes(token)
        return self._tokenizer.id_to_token(token) or "" if raw is None else raw.decode("utf-8", "replace")

    def token_name(self, token: int) -> str:
        """Its text where it has one, else what tells it from others: ``bytes:\\xe6`` as OpenAI writes bytes that are no
        whole character, or its number."""
        if self._details.numbered:
            return numbered(token)
        raw = self._tokenizer.token_bytes(token)
        if not raw:
            return self._tokenizer.id_to_token(token) or numbered(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def alternatives_at(self, branch: Branch, index: int) -> list[tuple[int, float]]:
        """Those to the token at `index`, as many as were asked for; best first."""
        return (branch.alternatives[index] or [])[: self._alternatives]

    def prompt_scores(self, entry: Entry) -> dict[str, Any]:
        """vLLM's extension."""
        if not self._details.scores_prompt:
            return {}
        return {"prompt_logprobs": entry.prompt_log.ranked(entry.prompt_ids, self.token_text)}


class Chunks(Frames):
    """The frames of an OpenAI stream: several tokens that came together share a chunk."""

    def __init__(self, shape: Shape, choices: list[Choice], entries: Sequence[Entry], told: UsageTold) -> None:
        self._shape = shape
        self._choices = choices
        self._entries = entries
        self._told = told
        head = shape.head(shape.chunk_object)
        self._head = _opened(head)
        self._first_head = _opened(head | shape.first_chunk(entries))  # of the first chunk
        self._begun = False
        self._tail = b"]}\n\n" if told is UsageTold.NEVER else b'],"usage":null}\n\n'

    def take(self) -> bytes:
        pieces = self._shape.pieces
        return b"".join(
            b"%b%b%b" % (self._next_head(), _json.encode(piece), self._tail_now())
            for choice in self._choices
            for piece in pieces(choice)
        )

    def _next_head(self) -> bytes:
        if self._begun:
            return self._head
        self._begun = True
        return self._first_head

    def _tail_now(self) -> bytes:
        if self._told is not UsageTold.ALWAYS:
            return self._tail
        return self._usage(sum(choice.sent for choice in self._choices))

    def _usage(self, completion: int) -> bytes:
        return b'],"usage":%b}\n\n' % _json.encode(self._shape.usage(self._entries, completion))

    def end(self) -> bytes:
        if self._told is UsageTold.NEVER:
            return self._shape.done
        return self._head + self._usage(_generated(self._entries)) + self._shape.done

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)


def _opened(head: dict[str, Any]) -> bytes:
    """The beginning of a frame, up to its choices."""
    return b"data: " + _json.encode(head)[:-1] + b',"choices":['


def error_frame(error: RequestError) -> bytes:
    """The end of a stream that can't go on."""
    return b"data: %b\n\n%b" % (_json.encode(openai_error(error)), DONE)
