"""LightLLM's own sampling parameters with the documented names, types, defaults and bounds: those of the native API's
bodies and of `LLM.generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.faults import contradiction
from lightllmd.requests.fields import (
    MAX_COUNT,
    MAX_PENALTY,
    MAX_SEED,
    CommonFields,
    Count,
    StopText,
    affordable_stops,
)
from lightllmd.requests.guided import GuidedFields, the_only_one
from lightllmd.text.stop import MAX_STOPS

DEFAULT_MAX_NEW_TOKENS = 16

StopIds = Annotated[list[Count], Field(min_length=1, max_length=1024, fail_fast=True)]


class Parameters(GuidedFields, CommonFields):
    """`parameters` of /generate, /generate_stream and /."""

    described = True

    return_details: bool = False
    best_of: Annotated[int, Field(ge=1, le=8)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    do_sample: bool = False
    presence_penalty: float = Field(default=0.0, ge=0, le=MAX_PENALTY)
    frequency_penalty: float = Field(default=0.0, ge=0, le=MAX_PENALTY)
    repetition_penalty: float = Field(default=1.0, ge=1, le=MAX_PENALTY)
    exponential_decay_length_penalty: tuple[Count, Annotated[float, Field(ge=1, le=MAX_PENALTY)]] = (1, 1.0)
    temperature: float = Field(default=1.0, ge=0, le=MAX_PENALTY)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=-1, ge=-1, le=MAX_COUNT)
    min_p: float = Field(default=0.0, ge=0, le=1, description="0: off")
    ignore_eos: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = None
    min_new_tokens: int = Field(default=1, ge=1, le=MAX_COUNT)
    stop_sequences: (
        StopText
        | Annotated[list[StopText], Field(max_length=MAX_STOPS), AfterValidator(affordable_stops)]
        | Annotated[list[StopIds], Field(max_length=MAX_STOPS), AfterValidator(affordable_stops)]
        | None
    ) = None
    skip_special_tokens: bool = True
    add_spaces_between_special_tokens: bool = True
    print_eos_token: bool = False
    input_penalty: bool = False
    add_special_tokens: bool = Field(default=True, description="as the tokenizer's own settings say; false: none")
    group_request_id: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = Field(
        default=None, description="accepted without effect: it names a request to the original's scheduler"
    )
    suggested_dp_index: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        default=None, description="accepted without effect: requests go where there is room"
    )
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = Field(default=None, description="-1 or absent: drawn")

    @model_validator(mode="before")
    @classmethod
    def _arrays_may_be_tuples(cls, values: Any) -> Any:
        """Strict validation takes no JSON array for a tuple."""
        decay = values.get("exponential_decay_length_penalty") if isinstance(values, dict) else None
        if isinstance(decay, list):
            return values | {"exponential_decay_length_penalty": tuple(decay)}
        return values

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_k == 0:
            raise contradiction("top_k", "top_k should be -1 (off) or at least 1; got 0")
        if self.n is not None and self.best_of is not None and self.n != self.best_of:
            raise contradiction("n", f"n should equal best_of; got n = {self.n}, best_of = {self.best_of}")
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise contradiction(
                "min_new_tokens",
                f"min_new_tokens should be at most max_new_tokens = {self.max_new_tokens}; got {self.min_new_tokens}",
            )
        return self

    @property
    def sequences(self) -> int:
        """For each prompt."""
        return self.best_of or self.n or 1

    @property
    def new_tokens(self) -> int:
        """At most so many; a default where the client doesn't say."""
        return self.max_new_tokens or max(DEFAULT_MAX_NEW_TOKENS, self.min_new_tokens)

    def asked(self, prompts: Sequence[Prompt], names: FieldNames, *, shows_prompt: bool) -> Asked:
        """`shows_prompt`: the answer has room for log-probabilities of the prompt."""
        stops = [self.stop_sequences] if isinstance(self.stop_sequences, str) else self.stop_sequences or []
        return Asked(
            prompts,
            self.sampling(),
            TextOptions(
                include_stop=True,
                skip_special_tokens=self.skip_special_tokens,
                spaces_between_special_tokens=self.add_spaces_between_special_tokens,
                print_eos_token=self.print_eos_token,
                min_tokens=self.min_new_tokens,
            ),
            names,
            None,
            self.new_tokens,
            seed=None if self.seed is None or self.seed < 0 else self.seed,
            stop_texts=[stop for stop in stops if isinstance(stop, str)],
            stop_sequences=[stop for stop in stops if not isinstance(stop, str)],
            bad_texts=self.bad_texts,
            add_special_tokens=self.add_special_tokens,
            shows_prompt=shows_prompt,
            prompts_first=True,
            constraint=the_only_one(self.guided(names.prefix)),
        )

    def sampling(self) -> SamplingParams:
        """For the engine; of bad words those that are token ids."""
        return SamplingParams(
            n=self.sequences,
            do_sample=self.do_sample and self.temperature >= 1e-5,
            temperature=self.temperature if self.do_sample else 1.0,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            exponential_decay_length_penalty=self.exponential_decay_length_penalty,
            input_penalty=self.input_penalty,
            ignore_eos=self.ignore_eos,
            max_new_tokens=self.new_tokens,
            min_new_tokens=self.min_new_tokens,
            **self.common_sampling(),
        )
