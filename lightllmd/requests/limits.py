"""Which prompt and how many new tokens fit: the documented length rules, in one place."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lightllmd.config.plan import Plan
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams

MAX_REPEATED = 1 << 21  # ids of biases, bad words and allowed tokens, times the prompts of the body
MAX_PAIRED = 1 << 22  # tokens of all pairs of a body, of which a text may stand in each
MAX_SCORED = 1 << 22  # log-probabilities of prompts, or scores, that one answer tells

Ids: TypeAlias = "list[int] | array[int]"


@dataclass(frozen=True)
class RequestLimits:
    """Of one plan. All checks raise InvalidRequest, which names the field, its value and the bound."""

    max_req_input_len: int
    max_req_total_len: int
    max_total_token_num: int
    running_max_req_size: int
    max_queue: int
    vocab_size: int
    eos_ids: frozenset[int]
    beam_mode: bool
    long_truncation_mode: str | None

    @classmethod
    def of(cls, plan: Plan) -> RequestLimits:
        """What the plan says."""
        params = plan.config.params
        return cls(
            params.max_req_input_len,
            params.max_req_total_len,
            plan.max_total_token_num,
            params.running_max_req_size,
            plan.config.http.max_queue,
            plan.vocab_size,
            frozenset(plan.eos_id),
            params.beam_mode,
            params.long_truncation_mode,
        )

    def prompt(self, ids: Ids, field: str) -> Ids:
        """The ids that are run; longer ones are cut by `long_truncation_mode` or refused.

        Those ids are checked here too: a tokenizer may know more of them than the model has embeddings.
        """
        first, end = self.cut(len(ids), field)
        if first < end:
            ids = ids[:first] + ids[end:]  # type: ignore[operator]
        self.token_ids(ids, field)
        return ids

    def cut(self, length: int, field: str) -> tuple[int, int]:
        """Of a prompt of so many tokens the first one that `long_truncation_mode` leaves out, and the next one that is
        kept. Raises InvalidRequest for one that is too long without it, or has no tokens."""
        limit = self.max_req_input_len
        if not length:
            raise InvalidRequest(f"{field}: the prompt has no tokens", param=field)
        if length <= limit:
            return 0, 0
        if self.long_truncation_mode is None:
            raise _overflow(f"your prompt resulted in {length} tokens", "max_req_input_len", limit, field)
        half = limit // 2 if self.long_truncation_mode == "center" else 0
        return half, length - (limit - half)

    def at_least(self, tokens: int, field: str) -> None:
        """Raises InvalidRequest if a prompt of so many tokens or more can't fit."""
        if tokens > self.max_req_input_len:
            result = f"your prompt resulted in at least {tokens} tokens"
            raise _overflow(result, "max_req_input_len", self.max_req_input_len, field)

    def ends(self, ids: array[int]) -> array[int]:
        """What is cut to the same as `ids`, without most of the middle."""
        kept = self.max_req_input_len + 1
        return ids if len(ids) <= 2 * kept else ids[:kept] + ids[-kept:]

    def _width(self, sequences: int) -> int:
        """Sequences that hold their tokens at the same time, come what may: beams."""
        return sequences if self.beam_mode else 1

    def room(self, prompt_tokens: int, sequences: int) -> int:
        """New tokens that fit behind the prompt in each sequence; may be < 1."""
        slots = (self.max_total_token_num - 1 - prompt_tokens) // self._width(sequences)
        return min(self.max_req_total_len - prompt_tokens, slots)

    def new_tokens(self, prompt_tokens: int, max_new_tokens: int, sequences: int, field: str) -> None:
        """0 of them: the prompt is run, for which the engine makes one token that is not shown."""
        width = self._width(sequences)
        for each, name, limit in (
            (max_new_tokens, "max_req_total_len", self.max_req_total_len),
            (width * max(1, max_new_tokens), "max_total_token_num - 1", self.max_total_token_num - 1),
        ):
            total = prompt_tokens + each
            if total > limit:
                beams = f" of {width} beams" if each > max_new_tokens else ""
                parts = f"{prompt_tokens} in the prompt, {each} in the completion{beams}"
                raise _overflow(f"you requested {total} tokens ({parts})", name, limit, field)

    def branches(self, n: int, field: str) -> None:
        """`n`: sequences for each prompt."""
        if n > self.running_max_req_size:
            raise InvalidRequest(
                f"{field}: {n} sequences, more than running_max_req_size = {self.running_max_req_size}", param=field
            )

    def at_once(self, sequences: int, field: str) -> None:
        """What one body may ask for: more could never wait in the queue together."""
        most = self.running_max_req_size + self.max_queue
        if sequences > most:
            raise InvalidRequest(
                f"{field}: {sequences} sequences, more than running_max_req_size + http.max_queue = {most}",
                param=field,
            )

    def repeated(self, params: SamplingParams, prompts: int, place: str) -> None:
        """What a body says of single tokens goes to the engine with each of its prompts."""
        numbers = {
            "allowed_token_ids": len(params.allowed_token_ids or ()),
            "bad_words": sum(map(len, params.bad_words)),
            "logit_bias": len(params.logit_bias),
        }
        if prompts > 1 and prompts * sum(numbers.values()) > MAX_REPEATED:
            field = place + max(numbers, key=numbers.__getitem__)
            raise InvalidRequest(
                f"{field}: {sum(numbers.values())} token ids for each of {prompts} prompts, more than {MAX_REPEATED} "
                "in all; send fewer prompts at a time",
                param=field,
            )

    def scored(self, prompt_tokens: int, alternatives: int, field: str) -> None:
        """All of a body's prompts; `alternatives`: beside each token's own log-probability, -1: none are asked for."""
        numbers = prompt_tokens * (alternatives + 1)
        if numbers > MAX_SCORED:
            raise InvalidRequest(
                f"{field}: {prompt_tokens} tokens with {alternatives + 1} log-probabilities each are {numbers}, "
                f"more than {MAX_SCORED} in all; send fewer prompts at a time",
                param=field,
            )

    def paired(self, tokens: int, field: str) -> None:
        """Of a body's pairs so far; `field` has the last text."""
        if tokens > MAX_PAIRED:
            raise InvalidRequest(
                f"{field}: with this one the pairs have {tokens} tokens, more than {MAX_PAIRED} in all; send fewer at "
                "a time",
                param=field,
            )

    def vectors(self, places: int, labels: int, field: str) -> None:
        """All of a body's prompts, which are scored at so many places."""
        if places * labels > MAX_SCORED:
            raise InvalidRequest(
                f"{field}: {places} places with {labels} scores each are {places * labels}, more than {MAX_SCORED} in "
                "all; send fewer prompts at a time",
                param=field,
            )

    def token_ids(self, ids: Sequence[int], field: str) -> None:
        """Each has to be one that the model has an embedding of."""
        if ids and not (min(ids) >= 0 and max(ids) < self.vocab_size):
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise InvalidRequest(f"{field}: token id {bad} is not within 0 .. {self.vocab_size - 1}", param=field)

    def constraints(self, params: SamplingParams, place: str) -> None:
        """What a request says of single tokens. `place` is the prefix of its fields' names."""
        self.token_ids([*params.logit_bias], f"{place}logit_bias")
        self.token_ids(params.allowed_token_ids or [], f"{place}allowed_token_ids")
        for word in params.bad_words:
            self.token_ids(word, f"{place}bad_words")
        if params.allowed_token_ids is None and not params.bad_words:
            return
        never = {word[0] for word in params.bad_words if len(word) == 1}
        if params.min_new_tokens > 1:
            never |= self.eos_ids
        allowed = range(self.vocab_size) if params.allowed_token_ids is None else params.allowed_token_ids
        if all(token in never for token in allowed):
            field = f"{place}{'bad_words' if params.bad_words else 'allowed_token_ids'}"
            before = f", and min_new_tokens = {params.min_new_tokens} no eos" if params.min_new_tokens > 1 else ""
            words = f" without the {len(params.bad_words)} bad_words" if params.bad_words else ""
            raise InvalidRequest(
                f"{field}: no token is left of the {len(allowed)} allowed{words}{before}",
                param=field,
            )


def _overflow(asked: str, name: str, limit: int, field: str) -> InvalidRequest:
    """In the words by which client programs know it, whatever the server."""
    return InvalidRequest(
        f"This model's maximum context length is {limit} tokens. However, {asked}, more than {name} = {limit} "
        f"({field}). Please reduce the length of the prompt or completion (context_length_exceeded).",
        param=field,
        code="context_length_exceeded",
    )
