"""How OpenAI's two routes show a sequence: whole, in chunks of a stream, and with log-probabilities."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from lightllmd.api.dialects.openai_bodies import UsageTold
from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.event_stream import DONE
from lightllmd.api.web.errors import openai_error
from lightllmd.errors import RequestError
from lightllmd.requests.branch import Branch
from lightllmd.requests.prompt_log import FLOOR, Alternatives
from lightllmd.text.interface import Tokenizer
from lightllmd.text.offsets import begins

_json = msgspec.json.Encoder()
TokenScore = tuple[int, float | None, Alternatives | None]  # its id; None: the first token of a prompt has none


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


def usage(entries: Sequence[Entry], completion: int) -> dict[str, Any]:
    """`completion`: tokens generated for them, as far as the client knows of them."""
    prompt = sum(entry.prompt_tokens for entry in entries)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(entry.cached for entry in entries)},
    }


def _generated(entries: Sequence[Entry]) -> int:
    return sum(entry.generated for entry in entries)


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
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": [self.whole(choice) for choice in choices],
            "usage": usage(entries, _generated(entries)),
        }

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
        return (branch.alternatives[index] or [])[: self._alternatives]

    def prompt_scores(self, entry: Entry) -> dict[str, Any]:
        """vLLM's extension."""
        if not self._details.scores_prompt:
            return {}
        return {"prompt_logprobs": entry.prompt_log.ranked(entry.prompt_ids, self.token_text)}


class ChatShape(Shape):
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def answer(self, choices: Sequence[Choice], entries: Sequence[Entry]) -> dict[str, Any]:
        return super().answer(choices, entries) | self.prompt_scores(entries[0]) | self.first_chunk(entries)

    def first_chunk(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {"prompt_token_ids": entries[0].prompt_ids} if self._details.token_ids else {}

    def whole(self, choice: Choice) -> dict[str, Any]:
        branch = choice.branch
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": branch.text, "refusal": None},
            "logprobs": self._logprobs(branch, 0, len(branch.ids)),
            "finish_reason": branch.finish,
        } | self.ids(branch.ids)

    def pieces(self, choice: Choice) -> Iterator[dict[str, Any]]:
        branch = choice.branch
        first, count = choice.sent, len(branch.ids)
        if not choice.begun and count:
            choice.begun = True
            yield self._delta(choice, {"role": "assistant", "content": ""})
        if count > first:
            choice.sent = count
            text = branch.texts[first] if count == first + 1 else "".join(branch.texts[first:count])
            logprobs = self._logprobs(branch, first, count)
            if text or logprobs is not None or self._details.token_ids:
                yield self._delta(choice, {"content": text}, logprobs) | self.ids(branch.ids[first:count])
        if branch.finish is not None and not choice.finished:
            choice.finished = True
            yield self._delta(choice, {}, finish=branch.finish)

    @staticmethod
    def _delta(
        choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, branch: Branch, first: int, end: int) -> dict[str, Any] | None:
        if self._alternatives is None:
            return None
        content = [
            self._token(branch.ids[index], branch.logprobs[index])
            | {"top_logprobs": [self._token(*other) for other in self.alternatives_at(branch, index)]}
            for index in range(first, end)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {
            "token": self.token_text(token),
            "logprob": max(logprob, FLOOR),
            "bytes": None if raw is None else list(raw),
        }


@dataclass(frozen=True)
class PromptText:
    """A prompt as text, which an answer may repeat, and behind which its own text begins."""

    text: str = ""
    offsets: Sequence[int] = ()  # the character that each of its tokens begins at; empty: they aren't shown


_NO_PROMPT = PromptText()


class CompletionShape(Shape):
    object = "text_completion"
    chunk_object = "text_completion"

    def __init__(
        self,
        answer_id: str,
        model: str,
        tokenizer: Tokenizer,
        details: Details,
        prompts: Sequence[PromptText] = (),
        *,
        echo: bool = False,
    ) -> None:
        """`prompts`: empty where their texts play no part; `echo`: the answer begins with them."""
        super().__init__(answer_id, model, tokenizer, details)
        self._prompts = prompts
        self._echo = echo

    def _prompt(self, choice: Choice) -> PromptText:
        return self._prompts[choice.prompt] if self._prompts else _NO_PROMPT

    def _echoed(self, choice: Choice) -> str:
        return self._prompt(choice).text if self._echo else ""

    def whole(self, choice: Choice) -> dict[str, Any]:
        branch = choice.branch
        return {
            "index": choice.index,
            "text": self._echoed(choice) + branch.text,
            "logprobs": self._logprobs(choice, 0, len(branch.ids)),
            "finish_reason": branch.finish,
            **self.prompt_scores(choice.entry),
            **self._prompt_ids(choice),
            **self.ids(branch.ids),
        }

    def _prompt_ids(self, choice: Choice) -> dict[str, Any]:
        return {"prompt_token_ids": choice.entry.prompt_ids} if self._details.token_ids else {}

    def pieces(self, choice: Choice) -> list[dict[str, Any]]:
        branch = choice.branch
        first, count = choice.sent, len(branch.ids)
        if count == first and (branch.finish is None or choice.finished):
            return []
        choice.sent = count
        choice.finished = branch.finish is not None
        text = branch.texts[first] if count == first + 1 else "".join(branch.texts[first:count])
        piece = {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, first, count),
            "finish_reason": branch.finish,
            **self.ids(branch.ids[first:count]),
        }
        if not choice.begun:
            choice.begun = True
            piece["text"] = self._echoed(choice) + text
            piece |= self._prompt_ids(choice)
        silent = not piece["text"] and self._alternatives is None and not self._details.token_ids
        return [] if silent and branch.finish is None else [piece]

    def _logprobs(self, choice: Choice, first: int, end: int) -> dict[str, Any] | None:
        """Of the generated tokens from `first` on, behind those of an echoed prompt if they are the first shown.

        An offset counts the characters of prompt and answer, whether or not the prompt is echoed."""
        if self._alternatives is None:
            return None
        branch, entry, prompt = choice.branch, choice.entry, self._prompt(choice)
        scores: list[TokenScore] = []
        offsets: list[int] = []
        if first == 0 and prompt.offsets:
            log, ids = entry.prompt_log, entry.prompt_ids
            scores = [(ids[0], None, ())]
            scores += zip(ids[1:], log.logprobs, map(log.alternatives, range(len(log.logprobs))), strict=True)
            offsets += prompt.offsets
        ids = branch.ids[first:end]
        scores += zip(ids, branch.logprobs[first:end], branch.alternatives[first:end], strict=True)
        offsets += self._offsets(choice, first, end, len(prompt.text))
        return {
            "tokens": [self.token_name(token) for token, _, _ in scores],
            "token_logprobs": [None if logprob is None else max(logprob, FLOOR) for _, logprob, _ in scores],
            "top_logprobs": [self._top(*score) for score in scores],
            "text_offset": offsets,
        }

    def _offsets(self, choice: Choice, first: int, end: int, prompt: int) -> list[int]:
        branch, own = choice.branch, self._tokenizer.vocabulary.text_length
        gained = branch.decoded_lengths(first, end)
        lengths = [0 if token in branch.unshown else own(token) for token in branch.ids[first:end]]
        at = prompt + choice.decoded
        choice.decoded += sum(gained)
        return begins(gained, lengths, at)

    def _top(self, own: int, logprob: float | None, others: Alternatives | None) -> dict[str, float] | None:
        """The best ones, and the token itself where it isn't among them; each under a name of its own."""
        if logprob is None:
            return None
        shown = [*(others or ())[: self._alternatives]]
        if all(token != own for token, _ in shown):
            shown.append((own, logprob))
        own_name = self.token_name(own)
        top: dict[str, float] = {}
        for token, value in shown:
            name = own_name if token == own else self.token_name(token)
            if token != own and (name == own_name or name in top):
                name = numbered(token)
            top[name] = max(value, FLOOR)
        return top


class Chunks:
    """The frames of an OpenAI stream: several tokens that came together share a chunk."""

    def __init__(self, shape: Shape, choices: list[Choice], entries: Sequence[Entry], told: UsageTold) -> None:
        self._shape = shape
        self._choices = choices
        self._entries = entries
        self._told = told
        head = {"id": shape.id, "object": shape.chunk_object, "created": shape.created, "model": shape.model}
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
        return b'],"usage":%b}\n\n' % _json.encode(usage(self._entries, completion))

    def end(self) -> bytes:
        if self._told is UsageTold.NEVER:
            return DONE
        return self._head + self._usage(_generated(self._entries)) + DONE

    def error(self, error: RequestError) -> bytes:
        return error_frame(error)


def _opened(head: dict[str, Any]) -> bytes:
    """The beginning of a frame, up to its choices."""
    return b"data: " + _json.encode(head)[:-1] + b',"choices":['


def error_frame(error: RequestError) -> bytes:
    return b"data: %b\n\n%b" % (_json.encode(openai_error(error)), DONE)
