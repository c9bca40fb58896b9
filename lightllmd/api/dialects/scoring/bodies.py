"""The bodies of vLLM's routes for models that score, with what Jina's and Cohere's clients send to /rerank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lightllmd.api.dialects.openai.bodies import MAX_PROMPTS, PromptIds
from lightllmd.api.dialects.openai.conversation import Conversation, Messages
from lightllmd.errors import InvalidRequest
from lightllmd.requests.asked import FieldOfTexts, TextPairs
from lightllmd.requests.faults import contradiction, shown
from lightllmd.requests.fields import MAX_COUNT, Body, RefusedField
from lightllmd.requests.guided import GuidedFields
from lightllmd.requests.scoring import ScoredPrompt, ScoresAsked
from lightllmd.requests.urgency import UrgencyFields
from lightllmd.text.pairs import PairCut

MAX_DOCUMENTS = 10_000  # Cohere's bound, too
MAX_RANK_FIELDS = 64
RESULT_SIZE = 64  # characters of an answer for one prompt, about
_NESTED = 1 << 16  # characters

_IMAGES = ("image", "image_url", "video_url", "input_audio", "audio_url", "file")
EARLIER_NAMES = ("activation", "softmax", "normalize")  # of use_activation, in vLLM's releases before

Text = str | dict[str, Any]
Texts = Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_DOCUMENTS, fail_fast=True)]
Cut = Annotated[int, Field(ge=0, le=MAX_COUNT)]
RankField = Annotated[str, Field(min_length=1, max_length=256)]


def text_of(value: Text, field: str, keys: Sequence[str] = ("text",)) -> str:
    """Of a text, of an object with one, or of the parts in vLLM's ``{"content": [...]}``. `keys`: of an object those
    whose values are the text, a line each. Raises InvalidRequest."""
    if isinstance(value, str):
        return value
    for kind in _IMAGES:
        if value.get(kind) is not None:
            raise InvalidRequest(f"{field}.{kind}: not available yet", param=f"{field}.{kind}")
    if isinstance(value.get("content"), list):
        return "".join(_part(part, f"{field}.content.{index}") for index, part in enumerate(value["content"]))
    lines = []
    for key in keys:
        line = value.get(key)
        if not isinstance(line, str):
            fault = "required" if key not in value else f"should be a string; got {shown(line)}"
            raise InvalidRequest(f"{field}.{key}: {fault}", param=f"{field}.{key}")
        lines.append(line)
    return "\n".join(lines)


def _part(part: Any, field: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _IMAGES:
        raise InvalidRequest(f"{field}: {kind} is not available yet", param=field)
    text = part.get("text") if kind == "text" else None
    if not isinstance(text, str):
        raise InvalidRequest(f"{field}: should be a part of type text; got {shown(part)}", param=field)
    return text


class ScoringBody(UrgencyFields, Body, ABC):
    """What all of them share."""

    lenient = True
    without_effect = frozenset({"user", "encoding_format"})
    refused: ClassVar[Mapping[str, RefusedField]] = {
        **dict.fromkeys(("chat_template", "dimensions", "mm_processor_kwargs"), RefusedField()),
        **dict.fromkeys(
            ("response_format", "structured_outputs", *GuidedFields.model_fields),
            RefusedField(why="this route generates no text"),
        ),
    }

    model: str | None = None
    use_activation: bool | None = Field(
        default=None, description="probabilities instead of the model's logits; absent: the route's own default"
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=MAX_COUNT)] | None = Field(
        default=None, description="of a longer prompt so many tokens are run; -1: as many as a prompt may have"
    )
    truncation_side: Literal["left", "right"] = Field(
        default="right", description="where the tokens are left out: right keeps the first ones"
    )

    @classmethod
    def prepare(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in EARLIER_NAMES:
            if body.get("use_activation") is None and isinstance(body.get(name), bool):
                body = body | {"use_activation": body[name]}
        return super().prepare({name: value for name, value in body.items() if name not in EARLIER_NAMES})

    @property
    @abstractmethod
    def answer_size(self) -> int:
        """See `Translation`."""


class PairsBody(ScoringBody):
    """Texts that are scored two by two."""

    max_tokens_per_query: Cut = Field(default=0, description="what is kept of each first text; 0: all of it")
    max_tokens_per_doc: Cut = Field(default=0, description="what is kept of each second text; 0: all of it")

    instruction: str | None = Field(default=None, description="as `instruction` in chat_template_kwargs")
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="further names for the model's chat template for pairs"
    )

    @abstractmethod
    def pairs(self) -> TextPairs:
        """Those that are asked for. Raises InvalidRequest."""

    def asked(self) -> ScoresAsked:
        """See `Translation`."""
        pairs = self.pairs()
        if self.chat_template_kwargs:
            pairs = replace(pairs, variables=self.chat_template_kwargs)
        if self.instruction is not None:
            named = pairs.variables_field if pairs.variables else "instruction"
            variables = {"instruction": self.instruction, **pairs.variables}
            pairs = replace(pairs, variables=variables, variables_field=named)
        cut = PairCut(
            self.max_tokens_per_query or None,
            self.max_tokens_per_doc or None,
            self.truncate_prompt_tokens,
            self.truncation_side == "left",
        )
        return ScoresAsked(pairs, pairs.second.name, self.model, pair_cut=cut)


def _field(name: str, texts: Texts, keys: Sequence[str] = ("text",)) -> FieldOfTexts:
    """`keys`: see `text_of`."""
    if not isinstance(texts, list):
        return FieldOfTexts(name, [text_of(texts, name, keys)], listed=False)
    found = [
        text if isinstance(text, str) else text_of(text, f"{name}.{index}", keys) for index, text in enumerate(texts)
    ]
    return FieldOfTexts(name, found)


class ScorePairsBody(PairsBody):
    """The body of /score: one text or several, in each of two fields. One first text is scored with each second one,
    several with one each."""

    described = True
    _names: ClassVar[tuple[tuple[str, str], ...]] = (
        ("queries", "documents"),
        ("queries", "items"),
        ("data_1", "data_2"),
        ("text_1", "text_2"),
    )

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = Field(default=None, description="another name of documents")
    data_1: Texts | None = Field(default=None, description="another name of queries")
    data_2: Texts | None = Field(default=None, description="another name of documents")
    text_1: Texts | None = Field(default=None, description="another name of queries")
    text_2: Texts | None = Field(default=None, description="another name of documents")

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        self._chosen()
        return self

    def _chosen(self) -> tuple[str, str]:
        given = {name for pair in self._names for name in pair if getattr(self, name) is not None}
        complete = [pair for pair in self._names if given == {*pair}]
        if len(complete) != 1:
            first = next((name for pair in self._names for name in pair if name in given), "queries")
            choices = ", ".join(" and ".join(pair) for pair in self._names)
            has = f"; got {', '.join(sorted(given))}" if given else ""
            raise contradiction(first, f"two fields are required, and no others of these: {choices}{has}")
        firsts, seconds = complete[0]
        numbers = [len(value) if isinstance(value := getattr(self, name), list) else 1 for name in (firsts, seconds)]
        if numbers[0] not in (1, numbers[1]):
            raise contradiction(
                firsts, f"{firsts} should have one text, or as many as {seconds} = {numbers[1]}; got {numbers[0]}"
            )
        return firsts, seconds

    @property
    def answer_size(self) -> int:
        return len(self.pairs()) * RESULT_SIZE

    def pairs(self) -> TextPairs:
        firsts, seconds = self._chosen()
        return TextPairs(_field(firsts, getattr(self, firsts)), _field(seconds, getattr(self, seconds)))


class RerankBody(PairsBody):
    """The body of /rerank: documents that are ranked by how well each fits the query."""

    described = True

    query: Text
    documents: Texts
    top_n: int = Field(default=0, ge=-1, le=MAX_COUNT, description="results that are told; 0 or -1: all of them")
    return_documents: bool = Field(default=True, description="each result has its document")
    rank_fields: Annotated[list[RankField], Field(min_length=1, max_length=MAX_RANK_FIELDS)] | None = Field(
        default=None, description="of documents that are objects the fields that are read; absent: text"
    )

    def pairs(self) -> TextPairs:
        documents = _field("documents", self.documents, self.rank_fields or ("text",))
        return TextPairs(_field("query", self.query), documents)

    def document(self, index: int) -> dict[str, Any]:
        """As an answer shows it: an object as it was given, a text as an object of its own."""
        found = self.documents[index] if isinstance(self.documents, list) else self.documents
        return {"text": found} if isinstance(found, str) else found

    @property
    def answer_size(self) -> int:
        documents = self.documents if isinstance(self.documents, list) else [self.documents]
        if not self.return_documents:
            return len(documents) * RESULT_SIZE
        return sum(RESULT_SIZE + _size(document) for document in documents)


def _size(document: Text) -> int:
    """Characters, at least; what is nested deeper is taken for long."""
    if isinstance(document, str):
        return len(document)
    return sum(len(value) if isinstance(value, str) else _NESTED for value in document.values() if value)


class PromptsBody(Conversation, ScoringBody):
    """Texts, token ids, or a conversation."""

    input: (
        str
        | PromptIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
        | None
    ) = None
    messages: Messages | None = None
    add_special_tokens: bool | None = Field(
        default=None, description="around texts; absent: yes. A conversation has those of the chat template"
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="whether the prompt ends with the head of an answer; absent: it doesn't"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise contradiction("input", "one of input and messages is required, and not both")
        if self.messages is not None and self.add_special_tokens:
            raise contradiction("add_special_tokens", "add_special_tokens is for input; the chat template adds them")
        return self

    def asked(self) -> ScoresAsked:
        """See `Translation`."""
        right = self.truncation_side == "right"
        return ScoresAsked(
            self._prompts(),
            "input" if self.messages is None else "messages",
            self.model,
            add_special_tokens=self.add_special_tokens is not False,
            keep_first=self.truncate_prompt_tokens if right else None,
            keep_last=None if right else self.truncate_prompt_tokens,
        )

    @property
    def answer_size(self) -> int:
        return (len(self.input) if isinstance(self.input, list) else 1) * RESULT_SIZE

    def _prompts(self) -> list[ScoredPrompt]:
        if self.messages is not None:
            chat = self.chat(self.messages)
            options = chat.options | {"add_generation_prompt": self.add_generation_prompt is True}
            return [ScoredPrompt(replace(chat, options=options), "messages")]
        assert self.input is not None
        if isinstance(self.input, (str, array)):
            return [ScoredPrompt(self.input, "input")]
        return [ScoredPrompt(one, f"input.{index}") for index, one in enumerate(self.input)]  # type: ignore[arg-type]


class ClassifyBody(PromptsBody):
    """The body of /classify."""

    described = True


class PoolingBody(PromptsBody):
    """The body of /pooling."""

    described = True

    task: str | None = Field(
        default=None,
        description="classify: scores of the prompt; token_classify: of its steps. Which one there is says the model",
    )
    encoding_format: Literal["float", "base64"] = "float"
    embed_dtype: Literal["float32", "float16", "bfloat16"] = Field(default="float32", description="of base64")
    endianness: Literal["native", "big", "little"] = Field(default="native", description="of base64")
