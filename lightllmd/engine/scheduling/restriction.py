"""Which tokens a request may generate next: its allowed ids, its bad words, its grammar, and what was taken back from
its prompt.

An allowed set may never be empty, or there would be nothing to draw: where the rules together leave no token, the ids
that end a generation are allowed, and where a model has none of those, everything is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightllmd.engine.scheduling.grammar_rows import CompiledGrammars, GrammarRow
from lightllmd.ipc.messages import SamplingParams

Allowed = NDArray[np.bool_]  # [vocab]
Ids = NDArray[np.int64]

_NONE: Ids = np.zeros(0, dtype=np.int64)


class Restriction(Protocol):
    """Of one sequence."""

    @property
    def overdue(self) -> bool:
        """Its masks take too long for the sequence to go on."""

    def for_sequence(self, beam: bool) -> Restriction:
        """Of a branch of the request: the same one where it keeps nothing of a sequence. `beam`: what was emitted may
        become other."""

    def mask(self, emitted: Sequence[int]) -> bytes:
        """What the token behind `emitted` may be, in the form of `Step.masks`; b"": anything."""

    def settled(self, emitted: Sequence[int]) -> bool:
        """From here on the mask stays what it is, whatever is generated."""


class Restrictions:
    """Makes the restrictions of an engine's requests."""

    def __init__(
        self,
        vocab_size: int,
        eos_ids: Iterable[int],
        vocabulary: Callable[[], Sequence[bytes | None]] | None,
        grammars: CompiledGrammars | None = None,
    ) -> None:
        """`vocab_size`: logits of the model. `vocabulary`: the bytes of each token by id, None (or no entry) for one
        that no text is made of; called once, by `load` or for the first request that needs it. Without it the bytes
        taken back from a prompt restrict nothing, without `grammars` no grammar does."""
        self._size = vocab_size
        self._eos = _within([*eos_ids], vocab_size)
        self._vocabulary, self._grammars = vocabulary, grammars
        self._everything = np.ones(vocab_size, dtype=np.bool_)

    def load(self) -> None:
        """Reads the vocabulary now (a few tenths of a second), so that no request has to wait for it."""
        if self._vocabulary is not None:
            self._index  # noqa: B018  read for its effect

    @cached_property
    def _index(self) -> ByteIndex:
        if self._vocabulary is None:
            raise RuntimeError("no vocabulary")
        vocabulary = list(self._vocabulary()[: self._size])
        for number in self._eos.tolist():
            if number < len(vocabulary):
                vocabulary[number] = None
        return ByteIndex(vocabulary)

    def each(
        self, params: SamplingParams, branches: int, beam: bool, rows: Sequence[GrammarRow] | None = None
    ) -> list[Restriction | None]:
        """One for each branch of a request. `rows`: those of its grammar, where they have been advanced already; those
        of beams are made anew, since they go back, too."""
        if rows and not beam:
            others = self._of_ids(params)
            return [_Grammatical(row, others, self._eos) for row in rows]
        restriction = self.of(params)
        return [restriction and restriction.for_sequence(beam) for _ in range(branches)]

    def of(self, params: SamplingParams) -> Restriction | None:
        """None: nothing restricts the request."""
        others = self._of_ids(params)
        if params.grammar is None or self._grammars is None:
            return others
        return _Grammatical(self._grammars.row(params), others, self._eos)

    def _of_ids(self, params: SamplingParams) -> Restriction | None:
        heals = bool(params.healing) and self._vocabulary is not None
        if params.allowed_token_ids is None and not params.bad_words and not heals:
            return None
        base = self._everything
        if params.allowed_token_ids is not None:
            base = np.zeros_like(base)
            base[_within(params.allowed_token_ids, self._size)] = True
        single = [word[0] for word in params.bad_words if len(word) == 1]
        if single:
            base = base.copy()
            base[_within(single, self._size)] = False
        words = [word for word in params.bad_words if len(word) > 1 and 0 <= word[-1] < self._size]
        prefix = Prefix(params.healing, self._index) if heals else None
        if words or prefix is not None:
            unrestricted = params.allowed_token_ids is None and not single
            return _Changing(base, b"" if unrestricted else _pack(base, self._eos), words, prefix, self._eos)
        return _Fixed(_pack(base, self._eos))


class _Fixed:
    overdue = False

    def __init__(self, mask: bytes) -> None:
        self._mask = mask

    def for_sequence(self, beam: bool) -> Restriction:
        return self

    def mask(self, emitted: Sequence[int]) -> bytes:
        return self._mask

    def settled(self, emitted: Sequence[int]) -> bool:
        return True


class _Changing:
    """Bad words of several tokens, and a prefix.

    Tokens that lie wholly in the prefix are the prompt's own text, so the other rules don't concern them: they rule
    those that reach beyond it.
    """

    overdue = False

    def __init__(
        self, base: Allowed, usual: bytes, words: Iterable[Sequence[int]], prefix: Prefix | None, eos: Ids
    ) -> None:
        """`base`: what the rules that never change allow, `usual` its mask."""
        self._base, self._usual = base, usual
        self._words: dict[int, list[Sequence[int]]] = {}  # by the last token but one
        for word in words:
            self._words.setdefault(word[-2], []).append(word)
        self._prefix = prefix
        self._eos = eos

    def for_sequence(self, beam: bool) -> Restriction:
        return self

    def mask(self, emitted: Sequence[int]) -> bytes:
        ends = self._word_ends(emitted)
        healing = None if self._prefix is None else self._prefix.next(emitted)
        if not ends and healing is None:
            return self._usual
        allowed = self._base.copy()
        allowed[ends] = False
        if healing is not None:
            inside, beyond = healing
            beyond = beyond[allowed[beyond]]
            allowed.fill(False)
            allowed[inside] = allowed[beyond] = True
        return _pack(allowed, self._eos)

    def settled(self, emitted: Sequence[int]) -> bool:
        return not self._words and (self._prefix is None or self._prefix.covered_by(emitted))

    def _word_ends(self, emitted: Sequence[int]) -> list[int]:
        """The tokens that would complete a bad word."""
        found = self._words.get(emitted[-1], []) if emitted else []
        return [word[-1] for word in found if list(emitted[1 - len(word) :]) == list(word[:-1])]


class _Grammatical:
    """A grammar, and what the other rules leave of it."""

    def __init__(self, row: GrammarRow, others: Restriction | None, eos: Ids) -> None:
        self._row, self._others, self._eos = row, others, eos

    @property
    def overdue(self) -> bool:
        return self._row.overdue

    def for_sequence(self, beam: bool) -> Restriction:
        return _Grammatical(self._row.fork(beam), self._others, self._eos)

    def mask(self, emitted: Sequence[int]) -> bytes:
        mask = self._row.mask(emitted)
        others = b"" if self._others is None else self._others.mask(emitted)
        if others:
            both = np.frombuffer(mask, np.uint8) & np.frombuffer(others, np.uint8)
            mask = both.tobytes() if both.any() else _bits(self._eos, len(mask))
        return mask

    def settled(self, emitted: Sequence[int]) -> bool:
        return False


class ByteIndex:
    """The tokens of a vocabulary in order of their bytes."""

    def __init__(self, vocabulary: Sequence[bytes | None]) -> None:
        """A token without bytes is found by none of the look-ups."""
        known: list[bytes] = [raw or b"" for raw in vocabulary]
        order = sorted((number for number, raw in enumerate(known) if raw), key=known.__getitem__)
        self._ids: Ids = np.array(order, dtype=np.int64)
        self._sorted = [known[number] for number in order]
        self._lengths = [len(raw) for raw in known]

    def length(self, token: int) -> int:
        """Bytes."""
        return self._lengths[token] if token < len(self._lengths) else 0

    def longer(self, raw: bytes) -> Ids:
        """Those that begin with `raw` and go on."""
        first = bisect_right(self._sorted, raw)
        return self._ids[first : bisect_right(self._sorted, raw, first, key=lambda token: token[: len(raw)])]

    def has(self, raw: bytes) -> bool:
        """Whether some token is exactly `raw`."""
        first = bisect_left(self._sorted, raw)
        return first < len(self._sorted) and self._sorted[first] == raw

    def begins(self, raw: bytes) -> bool:
        """Whether any token begins with `raw`."""
        first = bisect_left(self._sorted, raw)
        return first < len(self._sorted) and self._sorted[first].startswith(raw)

    def parts(self, raw: bytes) -> list[tuple[int, Ids]]:
        """(a length, the tokens that are the first so many bytes of `raw`), ascending."""
        found, first, end = [], 0, len(self._sorted)
        for length in range(1, len(raw) + 1):
            part = raw[:length]
            first = bisect_left(self._sorted, part, first, end)
            behind = bisect_right(self._sorted, part, first, end)
            if behind > first:
                found.append((length, self._ids[first:behind]))
            elif first == end or not self._sorted[first].startswith(part):
                break
        return found


class Prefix:
    """Bytes that a text has to begin with, however tokens cut them.

    Tokens that cut words as no tokenizer would are likely ones by themselves, but lead the model astray. So the prefix
    is covered by no more tokens than are needed to write it exactly. This lets the model write it as it stood in the
    prompt, and bounds what healing takes of max_new_tokens.
    """

    def __init__(self, text: bytes, index: ByteIndex) -> None:
        self._text, self._index = text, index
        self._coverable: dict[tuple[int, int], bool] = {}  # see _covers
        self._most = self._fewest()

    def next(self, emitted: Sequence[int]) -> tuple[Ids, Ids] | None:
        """(the tokens that may come behind `emitted` and end in the prefix or with it, those that cover the rest of it
        and go on); None: it is covered."""
        at = self._reached(emitted)
        if at is None:
            return None
        rest, left = self._text[at:], self._most - len(emitted) - 1
        inside = [ids for length, ids in self._index.parts(rest) if self._covers(at + length, left)]
        return np.concatenate([_NONE, *inside]), self._index.longer(rest)

    def _fewest(self) -> int:
        """Tokens that write the text exactly; one for each byte where none can."""
        places = seen = {0}
        for count in range(1, len(self._text)):
            if any(self._index.has(self._text[at:]) for at in places):
                return count
            places = {at + length for at in places for length, _ in self._index.parts(self._text[at:])} - seen
            seen = seen | places
        return len(self._text)

    def _covers(self, at: int, tokens: int) -> bool:
        """Whether no more than so many can go on from `at` to the end of the text, or beyond it."""
        if at == len(self._text):
            return True
        if tokens <= 0:
            return False
        if (at, tokens) not in self._coverable:
            rest = self._text[at:]
            self._coverable[at, tokens] = self._index.begins(rest) or (
                tokens > 1 and any(self._covers(at + length, tokens - 1) for length, _ in self._index.parts(rest))
            )
        return self._coverable[at, tokens]

    def covered_by(self, emitted: Sequence[int]) -> bool:
        """The generated tokens have written all of it."""
        return self._reached(emitted) is None

    def _reached(self, emitted: Sequence[int]) -> int | None:
        """The place in it behind the tokens generated so far; None: they cover all of it."""
        at = 0
        for token in emitted:
            at += self._index.length(token)
            if at >= len(self._text):
                return None
        return at


def _within(ids: Sequence[int], size: int) -> Ids:
    numbers = np.array(ids, dtype=np.int64)
    return numbers[(numbers >= 0) & (numbers < size)]


def _bits(ids: Ids, size: int) -> bytes:
    """The mask of `size` bytes that allows these tokens alone."""
    allowed = np.zeros(8 * size, np.bool_)
    allowed[ids] = True
    return np.packbits(allowed, bitorder="little").tobytes()


def _pack(allowed: Allowed, eos: Ids) -> bytes:
    if not allowed.any():
        if not len(eos):
            return b""
        allowed = allowed.copy()
        allowed[eos] = True
    return np.packbits(np.pad(allowed, (0, -len(allowed) % 32)), bitorder="little").tobytes()
