"""The work on a request's texts, whose time a client chooses: who needs it done says so, where it is done differs."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from lightllmd.grammar.check import GrammarCheck
from lightllmd.grammar.compiler import GrammarCompiler
from lightllmd.ipc.messages import Grammar
from lightllmd.requests.asked import Chat, TextPairs
from lightllmd.requests.bad_words import bad_word_ids
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.encoding import Encoder
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.pair_encoding import PairEncoder
from lightllmd.text.healing import writable
from lightllmd.text.image_places import ImageText
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairCut

Result = TypeVar("Result")

STOP_COST = 16  # characters that are tokenised in the time that an automaton takes for one of a stop
JOB_COST = 64  # the same of a job of a few tokens


class TextWork(Protocol):
    """Where a request's texts are read. All methods but `compute` raise InvalidRequest."""

    async def encode(
        self, texts: Sequence[str], fields: Sequence[str], *, add_special_tokens: bool, cut: bool
    ) -> list[list[int]]:
        """The ids of each text. Names one of the `fields` for text that is no valid Unicode or too long; `cut`: the
        caller cuts what is too long, of which the middle may be missing."""

    async def encode_chat(self, chat: Chat, field: str, *, cut: bool) -> list[int]:
        """As `encode`, and for a conversation that the model's template refuses, or if the model has none."""

    async def encode_seeing(
        self, content: str | Chat, field: str, image: ImageText, images: int, *, add_special_tokens: bool, cut: bool
    ) -> tuple[list[int], list[int]]:
        """The ids of a text or a conversation with so many images, each of which is one id, and the index of each.
        Raises InvalidRequest for another number of tags in a text."""

    async def encode_pairs(self, pairs: TextPairs, cut: PairCut) -> list[list[int]]:
        """See PairEncoder."""

    async def bad_words(self, words: Sequence[str], field: str) -> list[list[int]]:
        """The token sequences that write them."""

    async def grammar(self, constraint: Constraint) -> Grammar:
        """What the engine gets of a constraint that can be compiled, within bounds of time and memory."""

    async def compute(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """Work on `size` characters or numbers."""


class Inline(TextWork):
    """Everything at once, in the caller's thread. `tokenizer` is called when it is needed."""

    def __init__(self, tokenizer: Callable[[], Tokenizer], limits: RequestLimits) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._grammars = grammar_check(tokenizer, limits)

    async def encode(
        self, texts: Sequence[str], fields: Sequence[str], *, add_special_tokens: bool, cut: bool
    ) -> list[list[int]]:
        return self._tokenizer().encode_batch(texts, add_special_tokens)

    async def encode_chat(self, chat: Chat, field: str, *, cut: bool) -> list[int]:
        return self._tokenizer().encode_chat(chat.messages, **chat.options)

    async def encode_seeing(
        self, content: str | Chat, field: str, image: ImageText, images: int, *, add_special_tokens: bool, cut: bool
    ) -> tuple[list[int], list[int]]:
        encoder = Encoder(self._tokenizer(), self._limits)
        if isinstance(content, str):
            ids, places = encoder.encode_seeing(content, field, add_special_tokens, cut, image, images)
        else:
            ids, places = encoder.encode_chat_seeing(content.messages, content.options, field, cut, image, images)
        return ids.tolist(), places

    async def encode_pairs(self, pairs: TextPairs, cut: PairCut) -> list[list[int]]:
        return [ids.tolist() for ids in PairEncoder(self._tokenizer(), self._limits).encode(pairs, cut)]

    async def bad_words(self, words: Sequence[str], field: str) -> list[list[int]]:
        return bad_word_ids(words, field, self._tokenizer()) if words else []

    async def grammar(self, constraint: Constraint) -> Grammar:
        return self._grammars.check(constraint.grammar, constraint.field)

    async def compute(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        return work(*arguments)


def grammar_check(tokenizer: Callable[[], Tokenizer], limits: RequestLimits) -> GrammarCheck:
    """By the vocabulary as an engine has it."""
    return GrammarCheck(lambda: GrammarCompiler(writable(tokenizer()), limits.vocab_size, limits.eos_ids))


def without_waiting(work: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that waits for nothing, as with `Inline`; needs no event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        return end.value
    work.close()
    raise RuntimeError("the coroutine waits for something")
