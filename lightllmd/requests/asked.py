"""What is asked, said without any dialect: a dialect translates its body into this, `Intake` makes jobs of it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightllmd.dialogue.tools import Dialogue
from lightllmd.ipc.messages import SamplingParams
from lightllmd.requests.branch import TextOptions
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.images import AskedImage, taken_out


@dataclass(frozen=True)
class Chat:
    """A conversation, of which the model's chat template makes the text of a prompt."""

    messages: Sequence[dict[str, Any]]
    options: dict[str, Any]  # as `ChatTemplate.render`
    images: Sequence[AskedImage] = ()  # one for each part of the messages that is one, in their order

    @staticmethod
    def of(messages: Sequence[dict[str, Any]], options: dict[str, Any]) -> Chat:
        """Of messages among whose parts there may be an AskedImage."""
        images: list[AskedImage] = []
        return Chat([taken_out(message, images) for message in messages], options, images)

    @property
    def size(self) -> int:
        """Characters of the messages."""
        return sum(map(characters, self.messages))


def characters(message: dict[str, Any]) -> int:
    """Of one message."""
    content = message.get("content") or ""
    size = len(content) if isinstance(content, str) else sum(len(part.get("text") or "") for part in content)
    for call in message.get("tool_calls") or ():
        size += len(call["function"]["arguments"])
    return size + len(message.get("reasoning_content") or "")


@dataclass(frozen=True)
class FieldOfTexts:
    """A field of a body that has texts: a list, or a single one."""

    name: str  # in the dialect
    texts: Sequence[str]
    listed: bool = True

    def of(self, at: int) -> str:
        """The name of one text, for a refusal."""
        return f"{self.name}.{at}" if self.listed else self.name


@dataclass(frozen=True)
class TextPairs:
    """Texts that the model reads two by two, such as a query and each of its documents. They may be thousands, so that
    no object is made for each."""

    first: FieldOfTexts  # one text for all of the second ones, or one for each
    second: FieldOfTexts
    variables: Mapping[str, Any] = field(default_factory=dict)  # further names for the template that joins them
    variables_field: str = "chat_template_kwargs"  # the dialect's name of the field that has them

    def __len__(self) -> int:
        return len(self.second.texts)

    def first_at(self, at: int) -> int:
        """The index of the first text of a pair."""
        return 0 if len(self.first.texts) == 1 else at

    @property
    def size(self) -> int:
        """Characters of all pairs, of which a text may stand in each."""
        firsts, seconds = sum(map(len, self.first.texts)), sum(map(len, self.second.texts))
        return seconds + firsts * (len(self) if len(self.first.texts) == 1 else 1)


@dataclass(frozen=True)
class Prompt:
    """One prompt, and the dialect's name of the field that has it."""

    content: str | list[int] | array[int] | Chat
    field: str
    continued: bool  # it is a text that the output goes on with, so that its last tokens may be healed
    # Of a text: one for each of the model's tags for an image in it. None: what looks like a tag is text.
    images: Sequence[AskedImage] | None = None
    markdown: bool = False  # of a text: its images are Markdown's, where images are served


@dataclass(frozen=True)
class FieldNames:
    """What the dialect calls the fields that a refusal may have to name."""

    sequences: str  # how many there are for each prompt
    new_tokens: str | None = None  # how many at most; None: the body doesn't say, so that the prompt is named
    stops: str = "stop"  # texts and sequences of ids that end the output
    stop_tokens: str = "stop_token_ids"
    prefix: str = ""  # of logit_bias, allowed_token_ids, bad_words, length_penalty, use_beam_search
    subject: str | None = None  # what a refusal is about that names no field by itself
    prompts: str | None = None  # all prompts of the body, whose number and answer are bounded; None: it has one prompt


@dataclass(frozen=True)
class Asked:
    """One body. `params` has all that the engine is told, but for what differs between its prompts: there
    max_new_tokens is `new_tokens` or a bound of it. Bad words that are texts are not among its bad words yet, stops
    not in `text`."""

    prompts: Sequence[Prompt]
    params: SamplingParams
    text: TextOptions
    names: FieldNames
    model: str | None  # that shall answer; None: whichever is served
    new_tokens: int | None  # None: `default_new_tokens`, or fewer where no more fit
    default_new_tokens: int | None = None  # None: as many as fit
    seed: int | None = None  # 0 .. 2**63 - 1; None: each prompt gets one that is drawn
    stop_texts: Sequence[str] = ()
    stop_sequences: Sequence[Sequence[int]] = ()  # of token ids
    stop_tokens: Sequence[int] = ()
    bad_texts: Sequence[str] = ()
    constraint: Constraint | None = None  # what the output has to be
    add_special_tokens: bool = True  # around prompts that are texts
    drops_oldest: bool = False  # a chat that is too long goes without its oldest messages
    keep_last: int | None = None  # of a longer prompt the last so many tokens are run; -1: as many as fit
    beams: bool | None = None  # whether a beam search is expected; None: the server's mode decides
    shows_prompt: bool = True  # the answer has room for log-probabilities of the prompt
    dialogue: Dialogue | None = None  # tools and reasoning of the only prompt, a chat; None: all output is text
    prompts_first: bool = False  # of several faults one in a prompt is told before one in another field

    @property
    def brings_images(self) -> bool:
        """Whether a prompt has images, or may have some as Markdown."""
        return any(map(_brings_images, self.prompts))


def _brings_images(prompt: Prompt) -> bool:
    if isinstance(prompt.content, Chat):
        return bool(prompt.content.images)
    return bool(prompt.images) or (prompt.markdown and isinstance(prompt.content, str) and "![" in prompt.content)
