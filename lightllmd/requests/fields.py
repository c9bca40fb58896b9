"""What declarations of fields are made of, and the fields that several dialects have with the same name and meaning."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.requests.faults import fields_of, shown
from lightllmd.requests.urgency import UNHURRIED, Urgency, UrgencyFields
from lightllmd.text.stop import MAX_STOP_LENGTH, MAX_STOP_TOTAL

MAX_FIELDS = 1024  # of one object
MAX_IGNORED = 256  # names of unknown fields that are noted
MAX_SEED = 2**63 - 1
MAX_COUNT = 2**31 - 1  # of tokens, ids and the like
MAX_PENALTY = 1000.0  # beyond it fp32 logits mean nothing any more
MAX_LOGPROBS = 20  # alternatives per token
MAX_BIAS = 100
MAX_LENGTH_PENALTY = 10.0
MAX_ALLOWED = 1 << 19  # ids; no vocabulary has more
MAX_BAD_WORDS = 256
MAX_BAD_WORD = 256  # characters, or ids

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
_BadText = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD)]
_BadIds = Annotated[list[Count], Field(min_length=1, max_length=MAX_BAD_WORD, fail_fast=True)]


def _for_clients(schema: dict[str, Any], model: type[Body]) -> None:
    if not model.__dict__.get("described", False):
        schema.pop("description", None)


@dataclass(frozen=True)
class RefusedField:
    """Of a field that clients know and that is not built here."""

    idle: tuple[Any, ...] = (None,)  # values that ask for nothing, with which it is passed over
    why: str = "not available yet"
    code: str | None = None  # of the error
    inherited: bool = False  # the class has such a field, of those that it is made of


class Body(BaseModel):
    """Strict: no "1" for 1, no 2.0 for 2, no NaN. null says what leaving the field out says, where that is allowed.

    An unknown field is a fault, except where the class is `lenient` and its reader has a set to note such names in
    (pydantic's validation context)."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), json_schema_extra=_for_clients
    )
    lenient: ClassVar[bool] = False
    described: ClassVar[bool] = False  # its docstring is for clients, too: in the OpenAPI document
    # Beside the fields, what becomes of others that clients know. A class below may have one of them as a field.
    without_effect: ClassVar[frozenset[str]] = frozenset()  # accepted: they change nothing that a client could see
    refused: ClassVar[Mapping[str, RefusedField]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_idle_fields(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        fields, ignored = fields_of(cls), info.context if cls.lenient else None
        kept = {}
        for name, value in given.items():
            field = fields.get(name)
            if field is None and isinstance(ignored, set):
                if len(ignored) < MAX_IGNORED:
                    ignored.add(name)
            elif value is not None or field is None or field.is_required():
                kept[name] = value
        return kept

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        """Drops what is accepted without effect. Raises InvalidRequest for what is refused."""
        return cls.known(body)

    @classmethod
    def fields_that_work(cls) -> list[str]:
        """Their names, in the order of their declaration."""
        return [name for name in fields_of(cls) if name not in cls.refused or not cls.refused[name].inherited]

    @classmethod
    def known(cls, given: dict[str, Any], path: str = "") -> dict[str, Any]:
        """What is left of the fields `given` at `path`. Raises InvalidRequest for one that is refused."""
        fields = fields_of(cls)
        for name, refusal in cls.refused.items():
            if name in given and given[name] not in refusal.idle and (refusal.inherited or name not in fields):
                what = f"{path}{name}"
                told: dict[str, Any] = {"param": what} | ({} if refusal.code is None else {"code": refusal.code})
                raise InvalidRequest(f"{what}: {refusal.why}; got {shown(given[name])}", **told)
        dropped = {name for name in cls.without_effect.union(cls.refused) if name not in cls.fields_that_work()}
        return {name: value for name, value in given.items() if name not in dropped}

    @property
    def urgency(self) -> Urgency:
        """As the body says it."""
        return UNHURRIED


def affordable_stops(stops: list[Any]) -> list[Any]:
    """A validator of lists of stops: bounds what their automata take."""
    total = sum(map(len, stops))
    if total > MAX_STOP_TOTAL:
        raise ValueError(f"the stops should have at most {MAX_STOP_TOTAL} characters or ids in all; got {total}")
    return stops


def packed(ids: list[int]) -> array[int]:
    """Millions of ids leave the process that decoded them as fast as their bytes are copied."""
    return array("i", ids)


def _ascending(ids: list[int]) -> list[int]:
    return sorted({*ids})


def _biases(given: Any) -> Any:
    """Keys are strings, as JSON knows no others, or integers."""
    if not isinstance(given, dict):
        return given
    if len(given) > MAX_FIELDS:
        raise ValueError(f"{len(given)} tokens, more than {MAX_FIELDS}")
    biases = {}
    for key, bias in given.items():
        decimal = isinstance(key, str) and len(key) <= 10 and key.isascii() and key.isdecimal()
        if not decimal and type(key) is not int:
            raise ValueError(f"keys should be token ids; got {shown(key)}")
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of token {key} should be a number -{MAX_BIAS} … {MAX_BIAS}; got {shown(bias)}")
        biases[int(key)] = float(bias)
    return biases


class CommonFields(UrgencyFields, Body):
    """What LightLLM's own and the OpenAI routes share."""

    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] | None = Field(
        default=None, description="token id -> what is added to its logit, -100 … 100"
    )
    allowed_token_ids: (
        Annotated[list[Count], Field(min_length=1, max_length=MAX_ALLOWED, fail_fast=True), AfterValidator(_ascending)]
        | None
    ) = Field(default=None, description="no other token is generated, an eos that is not among them neither")
    bad_words: Annotated[list[_BadText | _BadIds], Field(max_length=MAX_BAD_WORDS)] | None = Field(
        default=None,
        description="never generated: sequences of token ids, or texts. A text, without the white space that it begins "
        "with (unless it is nothing else), is matched as the token sequences that it has at the beginning of a text "
        "and within one, there with and without a space before it; not as other tokens that happen to spell it, nor "
        "in other upper and lower case",
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None,
        description="locally typical sampling: of what is drawn from, the tokens whose surprise is nearest to the "
        "entropy, up to this mass; absent or 1: off",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="log-probabilities of the prompt's tokens, with so many alternatives to each; not in a stream. "
        "Such a request does not read the prompt cache, and its prompt is not healed",
    )
    disable_prompt_cache: bool = Field(default=False, description="neither reads nor fills the prompt cache")
    length_penalty: float = Field(
        default=1.0,
        ge=-MAX_LENGTH_PENALTY,
        le=MAX_LENGTH_PENALTY,
        description="of beam search: a beam scores its log-probability divided by (its tokens ** length_penalty)",
    )

    @property
    def bad_texts(self) -> list[str]:
        """Of `bad_words` those that are texts."""
        return [word for word in self.bad_words or () if isinstance(word, str)]

    def common_sampling(self) -> dict[str, Any]:
        """Of SamplingParams; of the bad words those that are token ids."""
        return {
            "logit_bias": self.logit_bias or {},
            "allowed_token_ids": self.allowed_token_ids,
            "bad_words": [word for word in self.bad_words or () if not isinstance(word, str)],
            "typical_p": 1.0 if self.typical_p is None else self.typical_p,
            "prompt_logprobs": -1 if self.prompt_logprobs is None else self.prompt_logprobs,
            "use_cache": not self.disable_prompt_cache,
            "length_penalty": self.length_penalty,
        }
