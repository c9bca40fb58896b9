"""What /v1/completions answers."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightllmd.api.dialects.openai.choices import Choice, Details, Shape, numbered
from lightllmd.requests.intake import AdmittedJob
from lightllmd.requests.prompt_log import FLOOR, Alternatives
from lightllmd.text.interface import Tokenizer
from lightllmd.text.offsets import begins, token_offsets

TokenScore = tuple[int, float | None, Alternatives | None]  # its id; None: the first token of a prompt has none


@dataclass(frozen=True)
class PromptText:
    """A prompt as text, which an answer may repeat, and behind which its own text begins."""

    text: str = ""
    offsets: Sequence[int] = ()  # the character that each of its tokens begins at; empty: they aren't shown


_NO_PROMPT = PromptText()


class CompletionShape(Shape):
    """Of /v1/completions."""

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


def prompt_text(
    tokenizer: Tokenizer, prompt: str | array[int], job: AdmittedJob, scored: bool, add_special_tokens: bool
) -> PromptText:
    """A text is what came, unless it was cut. `scored`: the log-probabilities of its tokens are shown."""
    ids = job.given_ids
    whole = prompt if isinstance(prompt, str) and not job.cut else None
    if whole is not None and not scored:
        return PromptText(whole)
    hides = isinstance(prompt, str) and job.cut
    detokenizing = tokenizer.detokenizing(
        skip_special_tokens=hides, spaces_between_special_tokens=False, print_eos_token=None
    )
    stream = detokenizing.open()
    pieces = [stream.push([token]) for token in ids]
    if whole is not None:
        special = {index for index, token in enumerate(ids) if token in tokenizer.special_ids}
        spans = tokenizer.spans(whole, add_special_tokens)
        return PromptText(whole, token_offsets(whole, pieces, spans, special))
    text = "".join(pieces) + stream.flush()
    if not scored:
        return PromptText(text)
    own = tokenizer.vocabulary.text_length
    lengths = [0 if token in detokenizing.unshown else own(token) for token in ids]
    return PromptText(text, begins(map(len, pieces), lengths))
