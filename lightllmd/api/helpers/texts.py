"""The work on clients' texts for one revision: short ones at once, all others in helper processes."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from lightllmd.api.helpers.grammars import CheckedGrammars
from lightllmd.api.helpers.pool import Helpers, HostedHelpers
from lightllmd.api.helpers.process import Task
from lightllmd.api.helpers.tasks import encoding_tasks
from lightllmd.api.helpers.token_views import TokenViews
from lightllmd.api.web import bodies
from lightllmd.ipc.messages import Grammar
from lightllmd.requests.asked import Chat, TextPairs
from lightllmd.requests.bad_words import bad_word_ids
from lightllmd.requests.constraint import Constraint
from lightllmd.requests.fields import Body
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.pair_encoding import PairEncoder
from lightllmd.text.image_places import ImageText
from lightllmd.text.interface import Tokenizer
from lightllmd.text.pairs import PairCut
from lightllmd.text.remote import RemoteTokenizer

_INLINE = 16 << 10  # characters or numbers; done with in a few milliseconds
_SHORT = 1 << 10  # characters; tokenised in well under a millisecond
_LONG = 64 << 10  # characters; what is longer waits its turn among others of its kind
_RENDERING = 5.0  # seconds of CPU time for the messages of a long chat
_BAD_WORD_COST = 16  # characters that are tokenised in the time that one of a bad word takes, in its several ways
_MANY_MESSAGES = 256
_FEW_PAIRS, _MANY_PAIRS = 64, 256
Result = TypeVar("Result")


async def off_loop(size: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Work on `size` characters or numbers: here when they are few, in a thread when they are many, so that streams go
    on."""
    if size <= _INLINE:
        return work(*arguments)
    return await asyncio.get_running_loop().run_in_executor(None, work, *arguments)


def _lists(arrays: list[array[int]]) -> list[list[int]]:
    return [ids.tolist() for ids in arrays]


class TextHelpers:
    """A `TextWork`, and what routes about texts alone need. All methods raise InvalidRequest."""

    def __init__(self, tokenizer: Tokenizer, limits: RequestLimits) -> None:
        encoding = encoding_tasks(tokenizer, limits)
        self._views = TokenViews(tokenizer, limits)
        others: dict[str, Task] = {"decode": bodies.decode_noting, "detokenize": self._views.detokenize}
        self._tokenizer = tokenizer
        self._pairs = PairEncoder(tokenizer, limits)
        self._hosted = isinstance(tokenizer, RemoteTokenizer)  # it encodes nothing in this process
        self.processes = Helpers(others if self._hosted else others | encoding)
        self.encoders = HostedHelpers(tokenizer) if isinstance(tokenizer, RemoteTokenizer) else self.processes
        self._grammars = CheckedGrammars(tokenizer, limits)

    def stop(self) -> None:
        """Ends all processes, for good."""
        self.processes.stop()
        self._grammars.stop()
        self.encoders.stop()

    # --- as TextWork ----------------------------------------------------------------------------------------------

    async def encode(
        self, texts: Sequence[str], fields: Sequence[str], *, add_special_tokens: bool = True, cut: bool = False
    ) -> list[list[int]]:
        """See TextWork."""
        size = sum(map(len, texts))
        if size <= _SHORT and not self._hosted:
            return [self._tokenizer.encode(text, add_special_tokens) for text in texts]
        ids = await self.encoders.run("encode", texts, fields, add_special_tokens, cut, heavy=size > _LONG)
        return await off_loop(sum(map(len, ids)), _lists, ids)

    async def encode_chat(self, chat: Chat, field: str, *, cut: bool = False) -> list[int]:
        """See TextWork. The template runs in a helper process, however short the messages are: its loops are its
        own."""
        size = chat.size
        if chat.options.get("variables") or chat.options.get("tools"):
            size += len(msgspec.json.encode(chat.options))
        if size <= _LONG and len(chat.messages) <= _MANY_MESSAGES:
            ids = await self.encoders.run("encode_chat", chat.messages, chat.options, field, cut, heavy=False)
            return ids.tolist()
        text = await self.render(chat)
        (encoded,) = await self.encode([text], [field], add_special_tokens=False, cut=cut)
        return encoded

    async def encode_seeing(
        self, content: str | Chat, field: str, image: ImageText, images: int, *, add_special_tokens: bool, cut: bool
    ) -> tuple[list[int], list[int]]:
        """See TextWork. Always in a helper process, as a chat."""
        arguments: tuple[Any, ...]
        if isinstance(content, str):
            arguments = ("encode_seeing", content, field, add_special_tokens, cut, image, images)
            heavy = len(content) > _LONG
        else:
            arguments = ("encode_chat_seeing", content.messages, content.options, field, cut, image, images)
            heavy = content.size > _LONG or len(content.messages) > _MANY_MESSAGES
        ids, places = await self.encoders.run(*arguments, heavy=heavy)
        return await off_loop(len(ids), ids.tolist), places

    async def encode_pairs(self, pairs: TextPairs, cut: PairCut) -> list[list[int]]:
        """See TextWork. Where a template joins them it runs in a helper process, as for a chat."""
        template = self._tokenizer.chat_template
        rendered = template is not None and template.joins_pairs
        # Where no template joins them, a text that stands in all of them is tokenised once.
        texts = sum(map(len, pairs.first.texts)) + sum(map(len, pairs.second.texts))
        few = len(pairs) <= _FEW_PAIRS and texts <= _SHORT and pairs.size <= _INLINE
        if few and not rendered and not self._hosted:
            return _lists(self._pairs.encode(pairs, cut))
        heavy = (pairs.size if rendered else texts) > _LONG or len(pairs) > _MANY_PAIRS or bool(pairs.variables)
        ids = await self.encoders.run("encode_pairs", pairs, cut, heavy=heavy)
        return await off_loop(sum(map(len, ids)), _lists, ids)

    async def bad_words(self, words: Sequence[str], field: str) -> list[list[int]]:
        """See TextWork."""
        if not words:
            return []
        size = sum(map(len, words)) * _BAD_WORD_COST
        if size <= _SHORT and not self._hosted:
            return bad_word_ids(words, field, self._tokenizer)
        return await self.encoders.run("bad_words", words, field, heavy=size > _LONG)

    async def grammar(self, constraint: Constraint) -> Grammar:
        """See TextWork."""
        return await self._grammars.check(constraint.grammar, constraint.field)

    async def compute(self, size: int, work: Callable[..., Result], *arguments: Any) -> Result:
        """See TextWork and `off_loop`."""
        return await off_loop(size, work, *arguments)

    # --- for other routes -----------------------------------------------------------------------------------------

    async def decode(self, raw: bytes, model: type[Body], noting: bool) -> tuple[Body, set[str]]:
        """`bodies.decode_noting` of a large body."""
        return await self.processes.run("decode", raw, model, noting, heavy=len(raw) > _LONG)

    async def render(self, chat: Chat) -> str:
        """The text that the model's chat template makes of a conversation."""
        return await self.encoders.run("render", chat.messages, chat.options, heavy=True, seconds=_RENDERING)

    async def count(self, text: str, *, add_special_tokens: bool = True) -> int:
        """Tokens of a text of any length."""
        if len(text) <= _SHORT and not self._hosted:
            return len(self._tokenizer.encode(text, add_special_tokens))
        return await self.encoders.run("count", text, add_special_tokens, heavy=len(text) > _LONG)

    async def tokenized(self, text: str, *, add_special_tokens: bool, strings: bool) -> bytes:
        """See TokenViews."""
        return await self.encoders.run("tokenize", text, add_special_tokens, strings, heavy=len(text) > _LONG)

    async def shown_ids(self, ids: Sequence[int], *, strings: bool) -> bytes:
        """See TokenViews.tokenized."""
        return await off_loop(len(ids), self._views.tokenized, ids, strings)

    async def detokenized(self, ids: Sequence[int]) -> bytes:
        """See TokenViews."""
        return await self.processes.run("detokenize", ids, heavy=len(ids) > _LONG)
