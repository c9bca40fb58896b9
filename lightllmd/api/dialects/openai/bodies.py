"""The bodies of the OpenAI routes: their own fields, LightLLM's sampling extensions, and what is refused by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from typing import Annotated, Any, ClassVar, Self

import msgspec
from pydantic import AfterValidator, Field, model_validator

from lightllmd.api.dialects.openai.chat_tools import DialogueFields
from lightllmd.api.dialects.openai.conversation import Conversation, Messages, check_answers
from lightllmd.api.dialects.openai.structured import StructuredFields
from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import (
    MAX_COUNT,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_SEED,
    Body,
    CommonFields,
    Count,
    RefusedField,
    StopText,
    affordable_stops,
    packed,
)
from lightllmd.text.stop import MAX_STOPS

MAX_N = 32
MAX_PROMPTS = 2048
MAX_STOP_IDS = 64
DEFAULT_COMPLETION_TOKENS = 16

# Documented by OpenAI and accepted without effect: they change nothing that a client could see here.
_HARMLESS = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "reasoning_effort",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
# Features that are not built: accepted only with a value that asks for nothing.
_NOT_YET: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    **dict.fromkeys(
        (
            "audio",
            "web_search_options",
            "chat_template",
        ),
        (None,),
    ),
}
_NO_SUFFIX = (
    "a completion here goes on from its prompt and knows no text behind it; a model that was trained to fill in takes "
    "both in the prompt, with its own tokens around them, such as <|fim_prefix|> … <|fim_suffix|> … <|fim_middle|>"
)


class UsageTold(Enum):
    """Where a stream tells how many tokens were used."""

    NEVER = "never"
    AT_END = "in the last chunk"
    ALWAYS = "in every chunk"


class StreamOptions(Body):
    """`stream_options`."""

    lenient = True

    include_usage: bool = False
    continuous_usage_stats: bool = Field(
        default=False, description="with include_usage: every chunk tells the usage so far, not only the last one"
    )
    include_obfuscation: bool = False


class SamplingFields(CommonFields):
    """How tokens are drawn and what ends them, with OpenAI's names."""

    lenient = True

    model: str | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS), AfterValidator(affordable_stops)] | None = (
        None
    )
    temperature: Annotated[float, Field(ge=0, le=MAX_PENALTY)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=MAX_SEED)] | None = None
    # LightLLM's extensions
    do_sample: bool | None = Field(default=None, description="false: greedy, whatever temperature says")
    top_k: int = Field(default=-1, ge=-1, le=MAX_COUNT)
    min_p: float = Field(default=0.0, ge=0, le=1, description="0: off")
    repetition_penalty: float = Field(default=1.0, ge=1, le=MAX_PENALTY)
    ignore_eos: bool = False
    min_tokens: int = Field(default=1, ge=0, le=MAX_COUNT)
    skip_special_tokens: bool = True
    # vLLM's, which clients send to any server
    stop_token_ids: Annotated[list[Count], Field(max_length=MAX_STOP_IDS, fail_fast=True)] | None = Field(
        default=None, description="tokens that end the answer"
    )
    include_stop_str_in_output: bool = Field(default=False, description="the answer shows what ended it")

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def wrapped_seed(self) -> int | None:
        """OpenAI's may be negative, ours have 63 bits."""
        return None if self.seed is None else self.seed & MAX_SEED

    def drawn(self, max_new_tokens: int, *, n: int = 1, top_logprobs: int = 0) -> SamplingParams:
        """For the engine. `max_new_tokens`: a bound where each prompt has a number of its own."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(
            n=n,
            do_sample=self.do_sample is not False and temperature >= 1e-5,
            temperature=temperature if temperature >= 1e-5 else 1.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or -1,  # vLLM's clients send 0 for off
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            ignore_eos=self.ignore_eos,
            max_new_tokens=max_new_tokens,
            min_new_tokens=max(1, min(self.min_tokens, max_new_tokens)),
            top_logprobs=top_logprobs,
            **self.common_sampling(),
        )


class OpenAIBody(StructuredFields, SamplingFields, ABC):
    """What both routes share."""

    without_effect = _HARMLESS
    refused: ClassVar[Mapping[str, RefusedField]] = {
        **{name: RefusedField(idle) for name, idle in _NOT_YET.items()},
        "suffix": RefusedField((None, ""), _NO_SUFFIX),
    }

    n: int | None = Field(default=None, ge=1, le=MAX_N)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    return_token_ids: bool = Field(default=False, description="the ids of prompt and answer, too")
    return_tokens_as_token_ids: bool = Field(
        default=False, description="log-probabilities call tokens token_id:N instead of by their text"
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        default=None, description="of a longer prompt the last so many tokens are used; -1: as many as fit"
    )
    use_beam_search: bool | None = Field(
        default=None, description="the server's beam_mode decides; a value that contradicts it is refused"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise contradiction("stream_options", "stream_options is for streams only; stream is not true")
        if self.prompt_logprobs is not None and self.stream:
            raise contradiction(
                "prompt_logprobs",
                f"prompt_logprobs is for answers in one piece, not for streams; got {self.prompt_logprobs}",
            )
        if self.asked_tokens is not None and self.min_tokens > max(1, self.asked_tokens):
            raise contradiction(
                "min_tokens", f"min_tokens should be at most max_tokens = {self.asked_tokens}; got {self.min_tokens}"
            )
        return self

    @property
    def asked_tokens(self) -> int | None:
        """New tokens that the body asks for; None: it doesn't say."""
        return self.max_tokens

    @property
    def asking_field(self) -> str | None:
        """Which says `asked_tokens`."""
        return None if self.max_tokens is None else "max_tokens"

    @property
    @abstractmethod
    def alternatives(self) -> int | None:
        """Alternatives per token; None: no logprobs at all."""

    @property
    def branches(self) -> int:
        """Sequences that are generated for each prompt."""
        return self.n or 1

    @property
    def usage_told(self) -> UsageTold:
        """In a stream."""
        options = self.stream_options
        if options is None or not options.include_usage:
            return UsageTold.NEVER
        return UsageTold.ALWAYS if options.continuous_usage_stats else UsageTold.AT_END

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """For the engine. `max_new_tokens`: a bound where each prompt has a number of its own."""
        return self.drawn(max_new_tokens, n=self.branches, top_logprobs=self.alternatives or 0)

    def _asked(
        self,
        prompts: Sequence[Prompt],
        names: FieldNames,
        *,
        default_new_tokens: int | None = None,
        add_special_tokens: bool = True,
    ) -> Asked:
        params = self.sampling(self.asked_tokens or MAX_COUNT)
        return Asked(
            prompts,
            params,
            TextOptions(
                include_stop=self.include_stop_str_in_output,
                skip_special_tokens=self.skip_special_tokens,
                # A native habit; clients parse what added tokens mark, such as tool calls.
                spaces_between_special_tokens=False,
                min_tokens=params.min_new_tokens,
                prompt_only=self.asked_tokens == 0,
            ),
            names,
            self.model,
            self.asked_tokens,
            default_new_tokens,
            seed=self.wrapped_seed,
            stop_texts=self.stops,
            stop_tokens=self.stop_token_ids or (),
            bad_texts=self.bad_texts,
            add_special_tokens=add_special_tokens,
            keep_last=self.truncate_prompt_tokens,
            beams=self.use_beam_search,
            shows_prompt=not self.stream,
            constraint=self._constrained(),
        )

    def _constrained(self) -> Constraint | None:
        constraint = self.constraint
        if constraint is not None and self.asked_tokens == 0:
            raise InvalidRequest(
                f"{constraint.field}: nothing is generated with max_tokens = 0", param=constraint.field
            )
        return constraint

    def _names(self, subject: str, prompts: str | None = None) -> FieldNames:
        sequences = "n" if self.branches == self.n else "best_of"
        return FieldNames(sequences, self.asking_field, subject=subject, prompts=prompts)


# One fault is told, not a million.
PromptIds = Annotated[list[Count], Field(min_length=1, fail_fast=True), AfterValidator(packed)]


class CompletionBody(OpenAIBody):
    """The body of /v1/completions."""

    prompt: (
        str
        | PromptIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
    )
    max_tokens: Annotated[int, Field(ge=0, le=MAX_COUNT)] | None = Field(
        default=None, description="0: nothing is generated; echo and logprobs give the prompt's log-probabilities"
    )
    best_of: int | None = Field(default=None, ge=1, le=MAX_N)
    echo: bool | None = None
    add_special_tokens: bool = Field(default=True, description="around a prompt that is a text")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _best_of(self) -> Self:
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise contradiction("best_of", f"best_of should be at least n = {self.n or 1}; got {self.best_of}")
        if self.best_of is not None and self.best_of > (self.n or 1) and self.stream:
            raise contradiction("best_of", f"best_of should equal n = {self.n or 1} in a stream; got {self.best_of}")
        return self

    def asked(self) -> Asked:
        """OpenAI documents a default of 16 tokens."""
        prompts = self.prompts
        fields = [f"prompt.{index}" for index in range(len(prompts))] if len(prompts) > 1 else ["prompt"]
        return self._asked(
            [Prompt(one, field, isinstance(one, str)) for one, field in zip(prompts, fields, strict=True)],
            self._names("prompt", "prompt"),
            default_new_tokens=max(DEFAULT_COMPLETION_TOKENS, self.min_tokens),
            add_special_tokens=self.add_special_tokens,
        )

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def scored_echo(self) -> int:
        """Alternatives shown beside each token of the prompt in `logprobs`; -1: the prompt isn't in there."""
        return self.logprobs if self.echo and self.logprobs is not None else -1

    def sampling(self, max_new_tokens: int) -> SamplingParams:
        """For the engine. `max_new_tokens`: a bound where each prompt has a number of its own."""
        params = super().sampling(max_new_tokens)
        return msgspec.structs.replace(params, prompt_logprobs=max(params.prompt_logprobs, self.scored_echo))

    @property
    def branches(self) -> int:
        """Sequences that are generated for each prompt."""
        return self.best_of or self.n or 1

    @property
    def prompts(self) -> list[str | array[int]]:
        """Those of the body, one or several."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]  # packed
        return list(self.prompt)  # type: ignore[arg-type]


class ChatBody(Conversation, DialogueFields, OpenAIBody):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise contradiction("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _results_of_calls(self) -> Self:
        check_answers(self.messages)
        return self

    @property
    def asked_tokens(self) -> int | None:
        """New tokens that the body asks for; None: it doesn't say."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def asking_field(self) -> str | None:
        return super().asking_field if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def asked(self) -> Asked:
        """What fits is generated at most, if the body doesn't say."""
        prompt = Prompt(self.chat(self.messages), "messages", self.continue_final_message)
        return replace(self._asked([prompt], self._names("messages")), dialogue=self.dialogue)
