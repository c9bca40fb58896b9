"""What a checkpoint's own tokenizer is like, found by asking it: names and texts of its tokens, and that they add up.

No two such classes keep their vocabulary alike, so several spellings are tried: tokens that are bytes (tiktoken),
GPT-2's byte alphabet, sentencepiece's pieces, the names as they are, and last the text that decoding gains from a
token. The first one is taken with which putting tokens together equals `decode` on every sample: texts of many kinds
and random ids.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.detokenize import TableStream
from lightllmd.text.fast import BYTE_PIECE
from lightllmd.text.remote import Export
from lightllmd.text.vocabulary import (
    BYTEWISE,
    MAX_TOKENS,
    LeadingSpace,
    Vocabulary,
    byte_level_texts,
    sentencepiece_texts,
    split_texts,
)

_TEXTS = (
    "The quick brown fox doesn't jump; it costs $3.50 (or 20%).",
    " leading and trailing \n\n\tspaces  and   runs ",
    "def f(x):\n    return x ** 2  # naïve\n",
    "Größe, Øre, Привет, мир! 你好，世界。こんにちは 안녕",
    "👩‍👩‍👧‍👦 🇨🇭 ∑∞ \u200b e\u0301",
)
_RANDOM, _LONGEST = 200, 12  # sequences of random ids, and how many ids they have at most
_MOST_DECODED = 1 << 18  # tokens whose texts are found by decoding each
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Texts = tuple[list[str | None], dict[int, bytes]]


class NotConcatenating(Exception):
    """Decoding is not putting together what each token says."""


def export(made: Any) -> Export:
    """Of an object of the class. Raises NotConcatenating, and whatever the class raises."""
    return _Exporter(made).export()


class _Exporter:
    def __init__(self, made: Any) -> None:
        from transformers import PreTrainedTokenizerBase

        if not isinstance(made, PreTrainedTokenizerBase):
            raise TypeError(f"{type(made).__name__} is no tokenizer of transformers")
        self._made = made
        self._own_chat = type(made).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        self._warnings: list[str] = []
        self._added: dict[int, Any] = dict(made.added_tokens_decoder)
        self._pieces = self._read_pieces()

    def export(self) -> Export:
        made = self._made
        names = [None if piece is None else _name(piece) for piece in self._pieces]
        special = self._special_ids()
        added = {number for number in self._added if 0 <= number < len(names)} | special
        vocabulary = self._vocabulary(names, special, added)
        texts, fragments = vocabulary.texts, vocabulary.fragments
        for number in added:  # shown as they are named
            texts[number] = names[number] or ""
            fragments.pop(number, None)
        bos, eos = made.bos_token_id, made.eos_token_id
        return Export(
            tokens=names,
            texts=texts,
            fragments=fragments,
            byte_errors=vocabulary.byte_errors,
            leading_space=vocabulary.leading_space.value,
            special_ids=sorted(special),
            added_ids=sorted(added),
            bos_id=None if bos is None else int(bos),
            eos_ids=[] if eos is None else [int(eos)],
            templates=self._templates(),
            special_tokens={role: str(text) for role in _ROLES if (text := getattr(made, role, None)) is not None},
            pair_frame=self._pair_frame(),
            own_chat=self._own_chat and self._chats_add_up(),
            warnings=self._warnings,
            pid=0,  # known where it runs
        )

    # --- tokens -------------------------------------------------------------------------------------------------

    def _read_pieces(self) -> list[str | bytes | None]:
        made = self._made
        try:
            known = [number for number in made.get_vocab().values() if isinstance(number, int)]
        except NotImplementedError:
            known = []
        size = 1 + max([len(made) - 1, *known, *self._added])
        if not 0 < size <= MAX_TOKENS:
            raise ValueError(f"a vocabulary of {size} tokens; 1 … {MAX_TOKENS} are possible")
        return [self._piece(number) for number in range(size)]

    def _piece(self, number: int) -> str | bytes | None:
        if number in self._added:
            return str(self._added[number])
        try:
            piece = self._made.convert_ids_to_tokens(number)
        except Exception:  # whatever a class does with an id that is no token
            return None
        return piece if isinstance(piece, str | bytes) else None

    def _special_ids(self) -> set[int]:
        """Added tokens that say so, and those that `decode` leaves out when it is told to."""
        made, pieces = self._made, self._pieces
        asked = {number for number, piece in enumerate(pieces) if piece is not None and _looks_special(piece)}
        asked |= {*made.all_special_ids, *self._added}
        marked = {number for number, token in self._added.items() if getattr(token, "special", False)}
        return {
            number
            for number in asked
            if isinstance(number, int) and 0 <= number < len(pieces) and pieces[number] is not None
            if number in marked or (not self._decode([number], skip=True) and self._decode([number]))
        }

    def _decode(self, ids: Sequence[int], *, skip: bool = False) -> str:
        text = self._made.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        if not isinstance(text, str):
            raise TypeError(f"decode makes {type(text).__name__}, not a text")
        return text

    def _pair_frame(self) -> tuple[list[int], list[int], list[int]]:
        """Found in what encoding two texts together makes; nothing where it makes something else of them."""
        made = self._made
        try:
            first, second = (list(made.encode(text, add_special_tokens=False)) for text in ("a", "b"))
            both = list(made("a", "b")["input_ids"])
        except Exception:  # a class that can't: its pairs are put together without anything
            return [], [], []
        begin = _find(first, both, 0)
        middle = -1 if begin < 0 else _find(second, both, begin + len(first))
        if middle < 0:
            return [], [], []
        return both[:begin], both[begin + len(first) : middle], both[middle + len(second) :]

    # --- their texts --------------------------------------------------------------------------------------------

    def _vocabulary(self, names: list[str | None], special: set[int], added: set[int]) -> Vocabulary:
        plain = [number for number, piece in enumerate(self._pieces) if piece is not None and number not in added]
        if not plain:
            raise ValueError("it has no token but special ones")
        # The shortest first: the one that is told where none fits.
        samples = [(ids, self._decode(ids)) for ids in sorted(self._samples(plain), key=len)]
        wrong: tuple[list[int], str, str] | None = None
        for spelling in (self._bytes, self._byte_level, self._sentencepiece, self._named, self._gained):
            found = spelling(plain)
            if found is None:
                continue
            texts, fragments = found
            tried = [*samples, *((ids, self._decode(ids)) for ids in _incomplete(sorted(fragments), plain))]
            for lead, byte_errors in product(LeadingSpace, ("replace", BYTEWISE)):
                made = Vocabulary(
                    names,
                    frozenset(special),
                    frozenset(added),
                    texts=texts,
                    fragments=fragments,
                    byte_errors=byte_errors,
                    leading_space=lead,
                )
                differing = _first_difference(made, tried)
                if differing is None:
                    return made
                wrong = wrong or differing
        assert wrong is not None
        ids, theirs, ours = wrong
        raise NotConcatenating(
            f"decoding is not putting together what each token says, which a stream needs: {ids} is {theirs!r}, its "
            f"tokens one by one are {ours!r}"
        )

    def _samples(self, plain: list[int]) -> Iterator[list[int]]:
        allowed, failures = set(plain), []
        for text in _TEXTS:
            try:
                ids = [int(number) for number in self._made.encode(text, add_special_tokens=False)]
                self._made.encode(text)
            except Exception as failure:  # a text that it can't say; requests are told
                failures.append(failure)
                continue
            yield [number for number in ids if number in allowed]
        if len(failures) == len(_TEXTS):
            raise failures[0]
        draw = random.Random(0)
        for _ in range(_RANDOM):
            yield draw.choices(plain, k=draw.randint(1, _LONGEST))

    def _table(self, spelt: dict[int, str]) -> Texts:
        return [spelt.get(number, "") for number in range(len(self._pieces))], {}

    def _bytes(self, plain: list[int]) -> Texts | None:
        if not all(isinstance(self._pieces[number], bytes) for number in plain):
            return None
        return split_texts(piece if isinstance(piece, bytes) else b"" for piece in self._pieces)

    def _strings(self, plain: list[int]) -> list[str | None] | None:
        known = set(plain)
        pieces = [piece if number in known else None for number, piece in enumerate(self._pieces)]
        return None if any(isinstance(piece, bytes) for piece in pieces) else pieces  # type: ignore[return-value]

    def _byte_level(self, plain: list[int]) -> Texts | None:
        pieces = self._strings(plain)
        return None if pieces is None else byte_level_texts(pieces)

    def _sentencepiece(self, plain: list[int]) -> Texts | None:
        pieces = self._strings(plain)
        if pieces is None:
            return None
        return sentencepiece_texts(
            pieces, [n for n, piece in enumerate(pieces) if piece and BYTE_PIECE.fullmatch(piece)]
        )

    def _named(self, plain: list[int]) -> Texts | None:
        pieces = self._strings(plain)
        return (
            None if pieces is None else self._table({n: piece for n, piece in enumerate(pieces) if piece is not None})
        )

    def _gained(self, plain: list[int]) -> Texts | None:
        """What decoding gains from a token behind another one."""
        if len(plain) > _MOST_DECODED:
            return None
        first = next((number for number in plain if self._decode([number]).isalpha()), plain[0])
        before = self._decode([first])
        spelt = {}
        for number in plain:
            both = self._decode([first, number])
            if not both.startswith(before) or "\ufffd" in both:
                return None
            spelt[number] = both[len(before) :]
        return self._table(spelt)

    # --- chats --------------------------------------------------------------------------------------------------

    def _templates(self) -> dict[str, str]:
        written = self._made.chat_template
        named = {"default": written} if isinstance(written, str) else written
        if not isinstance(named, dict) or not named:
            return {}
        try:
            ChatTemplate(named)
        except (ValueError, RecursionError) as error:
            self._warnings.append(f"{error}; chat requests will be refused")
            return {}
        return {str(name): str(text) for name, text in named.items()}

    def _chats_add_up(self) -> bool:
        """Whether the text of a chat, encoded, is the chat's tokens: what is counted and cut is the text."""
        made, chat = self._made, [{"role": "user", "content": "Hello, world"}]
        try:
            text = made.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            ids = made.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=False)
            same = isinstance(text, str) and list(ids) == list(made.encode(text, add_special_tokens=False))
        except Exception as failure:
            self._warnings.append(
                f"its own chats can't be made, so they are refused: {type(failure).__name__}: {failure}"
            )
            return False
        if not same:
            self._warnings.append("its own chats are not the tokens of their text, so they are refused")
        return same


def _find(some: list[int], ids: list[int], start: int) -> int:
    """Where they stand together, from `start` on; -1: nowhere."""
    places = range(start, len(ids) - len(some) + 1) if some else ()
    return next((at for at in places if ids[at : at + len(some)] == some), -1)


def _incomplete(fragments: list[int], plain: list[int]) -> Iterator[list[int]]:
    """Bytes that make no character, beside each other and among other tokens."""
    draw = random.Random(1)
    for _ in range(_RANDOM if fragments else 0):
        some = draw.choices(fragments, k=draw.randint(1, _LONGEST))
        yield [*some, draw.choice(plain), *draw.choices(fragments, k=draw.randint(0, 2))]


def _name(piece: str | bytes) -> str:
    return piece if isinstance(piece, str) else piece.decode("utf-8", "backslashreplace")


def _looks_special(piece: str | bytes) -> bool:
    name = _name(piece)
    return len(name) > 2 and (name[0] + name[-1]) in ("<>", "[]", "{}")


def _first_difference(
    vocabulary: Vocabulary, samples: Sequence[tuple[list[int], str]]
) -> tuple[list[int], str, str] | None:
    """(ids, their text by the class, and by the vocabulary)."""
    for ids, theirs in samples:
        stream = TableStream(vocabulary, frozenset(), vocabulary.leading_space)
        ours = stream.push(ids) + stream.flush()
        if ours != theirs:
            return ids, theirs, ours
    return None
