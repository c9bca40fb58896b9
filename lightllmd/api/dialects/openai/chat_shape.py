"""What /v1/chat/completions answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.api.dialects.openai.choices import Choice, Details, Shape
from lightllmd.api.inflight.entry import Entry
from lightllmd.dialogue.events import CallArguments, CallBegun, Content, Event, Reasoning, merged
from lightllmd.dialogue.parser import Parser
from lightllmd.dialogue.transcript import Transcript
from lightllmd.requests.branch import Branch
from lightllmd.requests.prompt_log import FLOOR
from lightllmd.text.interface import Tokenizer


@dataclass(frozen=True)
class Speech:
    """How the events of an answer are told."""

    parsers: Callable[[], Parser] | None = None  # None: all is content
    reasoning: bool = True  # false: it is left out
    functions: bool = False  # the call in the older form


class ChatShape(Shape):
    """Of /v1/chat/completions."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, answer_id: str, model: str, tokenizer: Tokenizer, details: Details, speech: Speech) -> None:
        super().__init__(answer_id, model, tokenizer, details)
        self._speech = speech
        self._transcripts: dict[int, Transcript] = {}  # by the index of the choice

    def _transcript(self, choice: Choice) -> Transcript:
        transcript = self._transcripts.get(choice.index)
        if transcript is None:
            assert self._speech.parsers is not None
            transcript = self._transcripts[choice.index] = Transcript(choice.branch, self._speech.parsers())
        return transcript

    def answer(self, choices: Sequence[Choice], entries: Sequence[Entry]) -> dict[str, Any]:
        return super().answer(choices, entries) | self.prompt_scores(entries[0]) | self.first_chunk(entries)

    def first_chunk(self, entries: Sequence[Entry]) -> dict[str, Any]:
        return {"prompt_token_ids": entries[0].prompt_ids} if self._details.token_ids else {}

    def usage(self, entries: Sequence[Entry], completion: int) -> dict[str, Any]:
        told = super().usage(entries, completion)
        if self._speech.parsers is None:
            return told
        reasoned = sum(transcript.reasoning_tokens for transcript in self._transcripts.values())
        return told | {"completion_tokens_details": {"reasoning_tokens": reasoned}}

    def whole(self, choice: Choice) -> dict[str, Any]:
        branch = choice.branch
        message, finish = self._message(choice)
        return {
            "index": choice.index,
            "message": message,
            "logprobs": self._logprobs(branch, 0, len(branch.ids)),
            "finish_reason": finish,
        } | self.ids(branch.ids)

    def _message(self, choice: Choice) -> tuple[dict[str, Any], str | None]:
        """And why it ended."""
        branch = choice.branch
        message: dict[str, Any] = {"role": "assistant", "content": branch.text, "refusal": None}
        if self._speech.parsers is None:
            return message, branch.finish
        transcript = self._transcript(choice)
        content: list[str] = []
        reasoning: list[str] = []
        calls: list[tuple[CallBegun, list[str]]] = []
        for event in transcript.take():
            if isinstance(event, Content):
                content.append(event.text)
            elif isinstance(event, Reasoning):
                reasoning.append(event.text)
            elif isinstance(event, CallBegun):
                calls.append((event, []))
            elif isinstance(event, CallArguments):
                calls[-1][1].append(event.text)
        message["content"] = "".join(content) or (None if calls else "")
        if reasoning and self._speech.reasoning:
            message["reasoning_content"] = message["reasoning"] = "".join(reasoning)
        if calls and self._speech.functions:
            begun, arguments = calls[0]
            message["function_call"] = {"name": begun.name, "arguments": "".join(arguments)}
        elif calls:
            message["tool_calls"] = [
                {
                    "id": begun.id,
                    "type": "function",
                    "function": {"name": begun.name, "arguments": "".join(arguments)},
                }
                for begun, arguments in calls
            ]
        return message, self._finish(transcript)

    def _finish(self, transcript: Transcript) -> str | None:
        finish = transcript.finish
        return "function_call" if finish == "tool_calls" and self._speech.functions else finish

    def pieces(self, choice: Choice) -> Iterator[dict[str, Any]]:
        branch = choice.branch
        first, count = choice.sent, len(branch.ids)
        if not choice.begun and count:
            choice.begun = True
            yield self._delta(choice, {"role": "assistant", "content": ""})
        finish = branch.finish
        if self._speech.parsers is not None:
            transcript = self._transcript(choice)
            events = transcript.take()
            if len(events) == 1 and type(events[0]) is Content:
                deltas = [{"content": events[0].text}]
            else:
                deltas = [delta for event in merged(events) if (delta := self._told(event)) is not None]
            finish = None if finish is None else self._finish(transcript)
        else:
            text = branch.texts[first] if count == first + 1 else "".join(branch.texts[first:count])
            deltas = [{"content": text}] if text else []
        logprobs = None
        ids: dict[str, Any] = {}
        if count > first:
            choice.sent = count
            logprobs = self._logprobs(branch, first, count)
            ids = self.ids(branch.ids[first:count])
            if not deltas and (logprobs is not None or ids):
                deltas = [{"content": ""}]
        for delta in deltas:
            yield self._delta(choice, delta, logprobs) | ids  # the first one has what belongs to all
            logprobs, ids = None, {}
        if finish is not None and not choice.finished:
            choice.finished = True
            yield self._delta(choice, {}, finish=finish)

    def _told(self, event: Event) -> dict[str, Any] | None:
        """As a delta; None: a client is not told of it."""
        if isinstance(event, Content):
            return {"content": event.text}
        if isinstance(event, Reasoning):
            return {"reasoning_content": event.text, "reasoning": event.text} if self._speech.reasoning else None
        if isinstance(event, CallBegun):
            function = {"name": event.name, "arguments": ""}
            if self._speech.functions:
                return {"function_call": function}
            return {"tool_calls": [{"index": event.index, "id": event.id, "type": "function", "function": function}]}
        if isinstance(event, CallArguments):
            if self._speech.functions:
                return {"function_call": {"arguments": event.text}}
            return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
        return None

    def _delta(
        self, choice: Choice, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        if self._details.as_tgi:
            delta = {"role": "assistant", "content": "", "tool_calls": None} | delta
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
