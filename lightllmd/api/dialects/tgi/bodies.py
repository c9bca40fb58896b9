"""The bodies of Text Generation Inference's routes: TGI's parameters with TGI's bounds and defaults, and those of
LightLLM that go beyond them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.asked import Asked, FieldNames, Prompt
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.faults import contradiction, shown
from lightllmd.requests.fields import (
    MAX_COUNT,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_SEED,
    Body,
    CommonFields,
    RefusedField,
    StopText,
    affordable_stops,
)
from lightllmd.requests.guided import Schema, schemas
from lightllmd.requests.urgency import Urgency
from lightllmd.text.stop import MAX_STOPS

MAX_BEST_OF = 8
DEFAULT_MAX_NEW_TOKENS = 100
_IDLE = (None, False)  # values that ask for nothing

_NAMES = FieldNames(
    sequences="parameters.best_of",
    new_tokens="parameters.max_new_tokens",
    stops="parameters.stop",
    prefix="parameters.",
)
Stops = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS), AfterValidator(affordable_stops)] | None


class TgiGrammar(Body):
    """`parameters.grammar`."""

    described = True
    lenient = True

    type: Literal["json", "regex", "json_schema"]
    value: Schema = Field(description="a schema, also as text, or with type regex the pattern")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.type == "regex" and not isinstance(self.value, str):
            raise contradiction("value", f"value should be the pattern with type regex; got {shown(self.value)}")
        return self

    @property
    def constraint(self) -> Constraint:
        """What it asks for. A json_schema may have a name beside its schema."""
        place, value = "parameters.grammar.value", self.value
        if self.type == "regex":
            return Constraint("regex", str(value), place)
        if self.type == "json_schema" and isinstance(value, dict) and "name" in value and "schema" in value:
            return schemas(value["schema"], f"{place}.schema")[0]
        return schemas(value, place)[0]


class TgiParameters(CommonFields):
    """`parameters` of /generate, /generate_stream and /. Without do_sample and all that shapes a draw the output is
    greedy."""

    described = True
    lenient = True
    refused: ClassVar[Mapping[str, RefusedField]] = {
        "watermark": RefusedField(_IDLE, "the output is not watermarked here"),
        "adapter_id": RefusedField(_IDLE),
        "prompt_logprobs": RefusedField(
            _IDLE, "decoder_input_details asks for the log-probabilities of the prompt", inherited=True
        ),
    }

    best_of: Annotated[int, Field(ge=1, le=MAX_BEST_OF)] | None = Field(
        default=None, description="of so many sequences the likeliest per token; not in a stream"
    )
    temperature: Annotated[float, Field(gt=0, le=MAX_PENALTY)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MAX_PENALTY)] | None = Field(
        default=None, description="counts the prompt's tokens, too, as frequency_penalty and presence_penalty do"
    )
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    top_k: Annotated[int, Field(gt=0, le=MAX_COUNT)] | None = None
    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    typical_p: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="locally typical sampling: the tokens whose surprise is nearest to the entropy, up to this mass",
    )
    do_sample: bool = False
    max_new_tokens: Annotated[int, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None, description=f"absent: {DEFAULT_MAX_NEW_TOKENS}, or fewer where no more fit"
    )
    return_full_text: bool = Field(default=False, description="generated_text begins with the prompt")
    stop: Stops = None
    truncate: Annotated[int, Field(gt=0, le=MAX_COUNT)] | None = Field(
        default=None, description="of a longer prompt the last so many tokens are used"
    )
    details: bool = False
    decoder_input_details: bool = Field(default=False, description="details with the prompt's tokens; not in a stream")
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)] | None = None
    grammar: TgiGrammar | None = Field(default=None, description="what the output has to be")
    top_n_tokens: int = Field(default=0, ge=0, le=MAX_LOGPROBS)
    # LightLLM's extensions
    stop_sequences: Stops = Field(default=None, description="stands for stop, which is left unread then")
    return_details: bool = Field(default=False, description="details by another name")
    presence_penalty: float = Field(default=0.0, ge=-2, le=MAX_PENALTY)
    min_p: float = Field(default=0.0, ge=0, le=1, description="0: off")
    ignore_eos: bool = False
    min_new_tokens: int = Field(default=1, ge=1, le=MAX_COUNT)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.max_new_tokens is not None and self.min_new_tokens > self.max_new_tokens:
            raise contradiction(
                "min_new_tokens",
                f"min_new_tokens should be at most max_new_tokens = {self.max_new_tokens}; got {self.min_new_tokens}",
            )
        if self.sequences > 1 and not (self.samples or self.temperature is not None):
            raise contradiction(
                "best_of", f"best_of should be 1 without sampling (do_sample is false); got {self.best_of}"
            )
        if self.sequences > 1 and self.seed is not None:
            raise contradiction("seed", f"seed should be absent with best_of = {self.best_of}; got {self.seed}")
        return self

    @property
    def sequences(self) -> int:
        """That are generated."""
        return self.best_of or 1

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn, which asking for another distribution implies."""
        shapes = (self.top_k, self.top_p, self.typical_p)
        return self.do_sample or self.temperature not in (None, 1.0) or any(one is not None for one in shapes)

    @property
    def detailed(self) -> bool:
        """Whether the answer tells of single tokens."""
        return self.details or self.return_details or self.decoder_input_details

    @property
    def stops(self) -> list[str]:
        """Texts that end the output."""
        given = self.stop if self.stop_sequences is None else self.stop_sequences
        return [given] if isinstance(given, str) else given or []

    def sampling(self) -> SamplingParams:
        """For the engine; of bad words those that are token ids."""
        temperature = 1.0 if self.temperature is None else self.temperature
        common = self.common_sampling()
        if self.decoder_input_details:
            common["prompt_logprobs"] = 0
        return SamplingParams(
            n=self.sequences,
            do_sample=self.samples and temperature >= 1e-5,
            temperature=temperature if temperature >= 1e-5 else 1.0,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=-1 if self.top_k is None else self.top_k,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            input_penalty=True,
            ignore_eos=self.ignore_eos,
            max_new_tokens=self.max_new_tokens or MAX_COUNT,
            min_new_tokens=self.min_new_tokens,
            top_logprobs=self.top_n_tokens,
            **common,
        )


class TgiBody(Body):
    """The body of /generate and /generate_stream."""

    lenient = True

    inputs: str = Field(min_length=1)
    parameters: TgiParameters = TgiParameters()

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        body = super().prepare(body)
        if isinstance(parameters := body.get("parameters"), dict):
            return body | {"parameters": TgiParameters.known(parameters, "parameters.")}
        return body

    @property
    def urgency(self) -> Urgency:
        """As `parameters` says it."""
        return self.parameters.urgency

    def asked(self, *, streamed: bool) -> Asked:
        """Raises InvalidRequest for what a stream can't do."""
        given = self.parameters
        if streamed and given.sequences != 1:
            raise InvalidRequest(f"parameters.best_of: a stream has one sequence, so should be 1; got {given.best_of}")
        if streamed and given.decoder_input_details:
            raise InvalidRequest(
                "parameters.decoder_input_details: a stream doesn't show the prompt's tokens, so should be false; "
                "got true"
            )
        return Asked(
            [Prompt(self.inputs, "inputs", True, markdown=True)],
            given.sampling(),
            TextOptions(include_stop=True, spaces_between_special_tokens=False, min_tokens=given.min_new_tokens),
            _NAMES,
            None,
            given.max_new_tokens,
            default_new_tokens=max(DEFAULT_MAX_NEW_TOKENS, given.min_new_tokens),
            seed=None if given.seed is None else given.seed & MAX_SEED,  # TGI's have 64 bits, ours 63
            stop_texts=given.stops,
            bad_texts=given.bad_texts,
            add_special_tokens=given.add_special_tokens,
            keep_last=given.truncate,
            shows_prompt=given.detailed and not streamed,
            constraint=None if given.grammar is None else given.grammar.constraint,
            prompts_first=True,
        )


class TgiEitherBody(TgiBody):
    """The body of POST /."""

    described = True
    stream: bool = False
