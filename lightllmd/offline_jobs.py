"""The requests of one call of `LLM`: checked together before anything begins, and what became of them.

Names, bounds and messages are the native HTTP API's, because it is the same declaration.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import msgspec
from pydantic import Field, ValidationError, model_validator

from lightllmd.errors import InvalidRequest
from lightllmd.ipc.messages import FINISH_ABORT, ImageSpan, PoolingParams, SamplingParams
from lightllmd.offline_images import asked_image
from lightllmd.requests.asked import Chat, FieldNames, Prompt
from lightllmd.requests.branch import Branch
from lightllmd.requests.faults import contradiction, from_validation, shown
from lightllmd.requests.fields import MAX_LOGPROBS
from lightllmd.requests.images import AskedImage, unseen
from lightllmd.requests.intake import AdmittedJob, Intake
from lightllmd.requests.parameters import Parameters
from lightllmd.requests.prompt_log import PromptLog
from lightllmd.requests.scoring import ScoredPrompt, ScoresAsked, ScoringJob
from lightllmd.requests.seeing import SeenImages
from lightllmd.requests.text_work import without_waiting
from lightllmd.text.interface import Tokenizer


@dataclass(frozen=True, slots=True)
class Generated:
    """One branch of an output. The lists have one entry per generated token."""

    token_ids: list[int]  # the ending eos or stop included
    text: str | None  # None: detokenize was False
    logprobs: list[float]  # natural log of the un-truncated softmax at the chosen token
    top_logprobs: list[list[tuple[int, float]]] | None  # (token id, logprob), best first; None: not asked for
    finish_reason: str  # "stop" | "length" | "abort": the model's logits were no numbers after these tokens

    @property
    def cumulative_logprob(self) -> float:
        """Of the whole branch."""
        return sum(self.logprobs)


@dataclass(frozen=True, slots=True)
class Output:
    """What one prompt gave."""

    prompt_token_ids: list[int]  # as they were run: cut where they were too long, without what was healed
    branches: list[Generated]  # n of them, of a beam search the best first
    prompt_tokens: int  # of the prompt, with what was healed
    cached: int  # of them, found in the prompt cache
    # Of prompt_token_ids[1:], where they were asked for; prompt_top_logprobs where alternatives were.
    prompt_logprobs: list[float] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]]] | None = None  # as Generated.top_logprobs

    @property
    def text(self) -> str | None:
        """The first branch's."""
        return self.branches[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first branch's."""
        return self.branches[0].token_ids


@dataclass(frozen=True, slots=True)
class Scored:
    """What a model that scores made of one prompt."""

    prompt_token_ids: list[int]  # as they were run: cut where they were too long
    # fp32 logits: a vector for each place that the model is read at, the prompt's last token or the end of each step;
    # a value for each label.
    values: list[list[float]]
    cached: int  # tokens of the prompt that were found in the prompt cache

    @property
    def score(self) -> float:
        """The first value of the last place: of a reward model, the reward."""
        return self.values[-1][0]


@dataclass(frozen=True, slots=True)
class Embedded:
    """What a model that doesn't score made of one prompt."""

    prompt_token_ids: list[int]  # as they were run: cut where they were too long
    embedding: list[float]  # fp32
    cached: int  # tokens of the prompt that were found in the prompt cache


class Fields(Parameters):
    """`parameters` of the native API, and what only OpenAI's routes have there."""

    top_logprobs: int = Field(default=0, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _unhurried(self) -> Self:
        for name, value in (("priority", self.priority), ("timeout", self.timeout)):
            if value is not None:
                raise contradiction(name, f"{name} is for requests over HTTP, so should be absent here; got {value}")
        return self

    def sampling(self) -> SamplingParams:
        """With the alternatives, too."""
        return msgspec.structs.replace(super().sampling(), top_logprobs=self.top_logprobs)


class OfflineJob:
    """A job on its way. `left` branches have not ended."""

    __slots__ = ("_checked", "_detokenized", "branches", "cached", "left", "prompt_log")

    def __init__(self, checked: AdmittedJob, tokenizer: Tokenizer | None) -> None:
        """Without a tokenizer its output has no text."""
        self._checked = checked
        self._detokenized = tokenizer is not None
        self.branches = checked.branches(tokenizer)
        self.prompt_log = PromptLog()
        self.cached = 0  # prompt tokens that were found in the prompt cache
        self.left = len(self.branches)

    @property
    def width(self) -> int:
        """Branches that the engine runs."""
        return len(self.branches)

    @property
    def params(self) -> SamplingParams:
        """As the engine gets them."""
        return self._checked.params

    @property
    def prompt_ids(self) -> list[int]:
        """As they are run."""
        return self._checked.prompt_ids

    @property
    def images(self) -> Sequence[ImageSpan]:
        """As `Submit.images`."""
        return self._checked.images

    @property
    def seen(self) -> SeenImages | None:
        """What is known of them."""
        return self._checked.seen

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt, with what was healed."""
        return len(self._checked.given_ids)

    @property
    def generated(self) -> int:
        """Tokens of all branches."""
        return sum(len(branch.ids) for branch in self.branches)

    def take(
        self, index: int, token: int, logprob: float, alternatives: list[tuple[int, float]] | None, finish: int
    ) -> bool:
        """The next token of a branch. True: its text ended it, so that the engine must be told."""
        branch = self.branches[index]
        if branch.finish is not None:  # made before the engine heard of the stop
            return False
        if finish == FINISH_ABORT:
            branch.finish = "abort"
            stopped = False
        else:
            stopped = branch.take(token, logprob, alternatives, finish)
        if branch.finish is not None:
            self.left -= 1
        return stopped

    def output(self) -> Output:
        """Once all branches have ended."""
        branches = [self._generated(branch) for branch in self.branches]
        log, asked = self.prompt_log, self.params.prompt_logprobs
        logprobs = log.logprobs if asked >= 0 else None
        tops = [log.alternatives(index) for index in range(len(log.logprobs))] if asked > 0 else None
        return Output(self.prompt_ids, branches, self.prompt_tokens, self.cached, logprobs, tops)

    def _generated(self, branch: Branch) -> Generated:
        tops = [others or [] for others in branch.alternatives] if self.params.top_logprobs else None
        text = branch.text if self._detokenized else None
        return Generated(branch.ids, text, branch.logprobs, tops, branch.finish or "abort")


class ScoreJob:
    """A prompt on its way to be scored, or embedded."""

    __slots__ = ("_checked", "cached", "vectors")
    width = 1  # branches that the engine runs
    branches: ClassVar[Sequence[Branch]] = ()

    def __init__(self, checked: ScoringJob) -> None:
        self._checked = checked
        self.cached = 0  # prompt tokens that were found in the prompt cache
        self.vectors: list[bytes] = []  # see `Pooled`

    @property
    def params(self) -> PoolingParams:
        """As the engine gets them."""
        return self._checked.params

    @property
    def prompt_ids(self) -> list[int]:
        """As they are run."""
        return self._checked.prompt_ids

    @property
    def images(self) -> Sequence[ImageSpan]:
        """As `Submit.images`."""
        return self._checked.images

    @property
    def seen(self) -> SeenImages | None:
        """What is known of them."""
        return self._checked.seen

    @property
    def prompt_tokens(self) -> int:
        """Of the prompt."""
        return len(self._checked.given_ids)

    @property
    def values(self) -> list[list[float]]:
        """The numbers of `vectors`."""
        return [array("f", vector).tolist() for vector in self.vectors]

    def output(self) -> Scored:
        """Once it has ended and was scored."""
        return Scored(self.prompt_ids, self.values, self.cached)

    def embedded(self) -> Embedded:
        """Once it has ended and was embedded."""
        (vector,) = self.values
        return Embedded(self.prompt_ids, vector, self.cached)


def pooling_jobs(
    intake: Intake,
    prompts: str | Sequence[str] | None,
    prompt_token_ids: Sequence[Sequence[int]] | None,
    **fields: Any,
) -> list[ScoreJob]:
    """One per prompt; `fields` are those of `ScoresAsked`. Raises InvalidRequest."""
    field, given = _one_of(prompts, prompt_token_ids)
    if prompt_token_ids is not None:
        given = [_token_ids(one, f"{field}[{number}]") for number, one in enumerate(given)]
    jobs = []
    for number, one in enumerate(given):
        if prompt_token_ids is None and not isinstance(one, str):
            raise InvalidRequest(f"prompts[{number}]: should be a string; got {shown(one)}")
        prompt = ScoredPrompt(one, f"{field}[{number}]")
        asked = ScoresAsked([prompt], field, **fields)
        jobs += without_waiting(intake.scores(asked))
    return [ScoreJob(job) for job in jobs]


def _one_of(
    prompts: str | Sequence[str] | None, prompt_token_ids: Sequence[Sequence[int]] | None
) -> tuple[str, Sequence[Any]]:
    """The name of the one that is given, and what it is. Raises InvalidRequest."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if (texts is None) == (prompt_token_ids is None):
        raise InvalidRequest("prompts, prompt_token_ids: one of the two is needed; got " + ("both", "none")[not texts])
    return ("prompts", texts) if texts is not None else ("prompt_token_ids", prompt_token_ids or [])


def open_jobs(
    intake: Intake,
    tokenizer: Callable[[], Tokenizer],
    prompts: str | Sequence[str] | None,
    prompt_token_ids: Sequence[Sequence[int]] | None,
    parameters: Sequence[Mapping[str, Any]] | None,
    sampling: Mapping[str, Any],
    detokenize: bool,
    images: Sequence[Any] | None = None,
) -> list[OfflineJob]:
    """One per prompt. `tokenizer` is called when text is read or written. Raises InvalidRequest."""
    field, given = _one_of(prompts, prompt_token_ids)
    shown_images = _images(images, prompts, given, field)
    content: Sequence[Any]
    if prompt_token_ids is not None:
        content = [_token_ids(one, f"{field}[{number}]") for number, one in enumerate(given)]
    elif images is not None:
        content = _texts(given)
    else:
        content = _encode(given, tokenizer)
    asked = [
        Prompt(one, f"{field}[{number}]", continued=prompt_token_ids is None, images=None if images is None else own)
        for number, (one, own) in enumerate(zip(content, shown_images, strict=True))
    ]
    return _jobs(intake, tokenizer, asked, parameters, sampling, detokenize)


def chat_jobs(
    intake: Intake,
    tokenizer: Callable[[], Tokenizer],
    conversations: Sequence[Any],
    parameters: Sequence[Mapping[str, Any]] | None,
    sampling: Mapping[str, Any],
    variables: dict[str, Any],
) -> list[OfflineJob]:
    """One per conversation. Raises InvalidRequest."""
    single = bool(conversations) and isinstance(conversations[0], Mapping)
    asked = []
    for number, messages in enumerate([conversations] if single else conversations):
        place = f"conversations[{number}]"
        told = [_message(message, f"{place}[{index}]") for index, message in enumerate(messages)]
        chat = Chat.of(told, {"add_generation_prompt": True, "variables": variables})
        asked.append(Prompt(chat, place, continued=False))
    return _jobs(intake, tokenizer, asked, parameters, sampling, True)


def _message(message: Any, place: str) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{place}: should be a dict with role and content; got {shown(message)}")
    content = message.get("content")
    if isinstance(content, list):
        content = [_part(part, f"{place}.content[{index}]") for index, part in enumerate(content)]
    return {**message, "content": content}


def _part(part: Any, place: str) -> Any:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return asked_image(part.get("image"), f"{place}.image")
    if kind == "image_url":
        url = part.get("image_url")
        return asked_image(url.get("url") if isinstance(url, Mapping) else url, f"{place}.image_url")
    unseen(kind, place)
    return part


def _jobs(
    intake: Intake,
    tokenizer: Callable[[], Tokenizer],
    prompts: Sequence[Prompt],
    parameters: Sequence[Mapping[str, Any]] | None,
    sampling: Mapping[str, Any],
    detokenize: bool,
) -> list[OfflineJob]:
    jobs = []
    settings = _settings(len(prompts), parameters, sampling)
    for prompt, (place, fields) in zip(prompts, settings, strict=True):
        asked = fields.asked([prompt], _names(place, prompt), shows_prompt=True)
        if asked.stop_texts and not detokenize:
            got = shown(asked.stop_texts)
            raise InvalidRequest(f"{place}stop_sequences: texts need detokenize = True; got {got}")
        sees = prompt.images or (isinstance(prompt.content, Chat) and prompt.content.images)
        jobs += (_in_a_thread if sees else without_waiting)(intake.jobs(asked))
    return [OfflineJob(job, tokenizer() if detokenize else None) for job in jobs]


def _in_a_thread(work: Coroutine[Any, Any, list[AdmittedJob]]) -> list[AdmittedJob]:
    """What may wait, for an image from the web; the caller's own thread may have an event loop."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _images(
    images: Sequence[Any] | None, prompts: str | Sequence[str] | None, given: Sequence[Any], field: str
) -> list[list[AskedImage]]:
    """Those of each prompt. Raises InvalidRequest."""
    if images is None:
        return [[] for _ in given]
    if field != "prompts":
        raise InvalidRequest("images: they are for prompts that are texts; prompt_token_ids have no tags")
    lists = [images] if isinstance(prompts, str) else images
    if len(lists) != len(given) or any(isinstance(one, str | bytes) or not isinstance(one, Sequence) for one in lists):
        raise InvalidRequest(f"images: one list of images per prompt is needed, {len(given)} in all")
    return [
        [asked_image(image, f"images[{number}][{index}]") for index, image in enumerate(one)]
        for number, one in enumerate(lists)
    ]


def _names(place: str, prompt: Prompt) -> FieldNames:
    """`place`: what comes before the names of fields."""
    return FieldNames(
        sequences=f"{place}n",
        new_tokens=f"{place}max_new_tokens of {prompt.field}",
        stops=f"{place}stop_sequences",
        prefix=place,
    )


def _settings(
    count: int, parameters: Sequence[Mapping[str, Any]] | None, sampling: Mapping[str, Any]
) -> Iterator[tuple[str, Fields]]:
    """Per prompt: where its fields stand, as a prefix for messages, and the fields."""
    if parameters is None:
        fields = _fields(sampling, "")
        for _ in range(count):
            yield "", fields
        return
    if isinstance(parameters, Mapping) or len(parameters) != count:
        got = "one mapping" if isinstance(parameters, Mapping) else f"{len(parameters)}"
        raise InvalidRequest(f"parameters: one dict per prompt is needed, {count} in all; got {got}")
    for number, own in enumerate(parameters):
        place = f"parameters[{number}]."
        if not isinstance(own, Mapping):
            raise InvalidRequest(f"{place[:-1]}: should be a dict; got {shown(own)}")
        yield place, _fields({**sampling, **own}, place)


def _fields(given: Mapping[str, Any], place: str) -> Fields:
    try:
        return Fields.model_validate(dict(given))
    except ValidationError as failure:
        refusal = from_validation(failure, Fields)
        raise InvalidRequest(place + refusal.message, **refusal.parameters) from None


def _texts(texts: Sequence[str]) -> Sequence[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidRequest(f"prompts[{number}]: should be a string; got {shown(text)}")
    return texts


def _encode(texts: Sequence[str], tokenizer: Callable[[], Tokenizer]) -> list[list[int]]:
    return tokenizer().encode_batch(_texts(texts)) if texts else []


def _token_ids(given: Sequence[int], field: str) -> list[int]:
    if isinstance(given, str | bytes | int) or not isinstance(given, Sequence):
        raise InvalidRequest(f"{field}: should be a list of token ids; got {shown(given)}")
    if any(kind is not int for kind in set(map(type, given))):
        wrong = next(one for one in given if type(one) is not int)
        raise InvalidRequest(f"{field}: token ids should be integers; got {shown(wrong)}")
    return list(given)
