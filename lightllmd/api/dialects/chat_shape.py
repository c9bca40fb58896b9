"""What /v1/chat/completions answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightllmd.api.dialects.choices import Choice, Shape
from lightllmd.api.inflight.entry import Entry
from lightllmd.requests.branch import Branch
from lightllmd.requests.prompt_log import FLOOR


class ChatShape(Shape):
    """Of /v1/chat/completions."""

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
