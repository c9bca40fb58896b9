"""Which tokens a request may generate next: its allowed ids, its bad words, and what was taken back from its prompt.

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

from lightllmd.ipc.messages import SamplingParams

Allowed = NDArray[np.bool_]  # [vocab]
Ids = NDArray[np.int64]


class Constraint(Protocol):
    """Of one request. It holds no state of a sequence, so all branches share it."""

    stepwise: bool  # its mask depends on the tokens generated so far

    def mask(self, emitted: Sequence[int]) -> bytes:
        """What the token behind `emitted` may be, in the form of `Step.masks`; b"": anything."""

    def settled(self, emitted: Sequence[int]) -> bool:
        """From here on the mask stays what it is, whatever is generated."""


class Constraints:
    """Makes the constraints of an engine's requests."""

    def __init__(
        self, vocab_size: int, eos_ids: Iterable[int], vocabulary: Callable[[], Sequence[bytes | None]] | None
    ) -> None:
        """`vocab_size`: logits of the model. `vocabulary`: the bytes of each token by id, None (or no entry) for one
        that no text is made of; called once, by `load` or for the first request that needs it. Without it the bytes
        taken back from a prompt restrict nothing."""
        self._size = vocab_size
        self._eos = _within([*eos_ids], vocab_size)
        self._vocabulary = vocabulary
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

    def of(self, params: SamplingParams) -> Constraint | None:
        """None: nothing restricts the request."""
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
            return _Stepwise(base, b"" if unrestricted else _pack(base, self._eos), words, prefix, self._eos)
        return _Fixed(_pack(base, self._eos))


class _Fixed:
    stepwise = False

    def __init__(self, mask: bytes) -> None:
        self._mask = mask

    def mask(self, emitted: Sequence[int]) -> bytes:
        return self._mask

    def settled(self, emitted: Sequence[int]) -> bool:
        return True


class _Stepwise:
    """Bad words of several tokens, and a prefix.

    Tokens that lie wholly in the prefix are the prompt's own text, so the other rules don't concern them: they rule
    those that reach beyond it.
    """

    stepwise = True

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

    def mask(self, emitted: Sequence[int]) -> bytes:
        ends = self._word_ends(emitted)
        at = None if self._prefix is None else self._prefix.reached(emitted)
        if not ends and at is None:
            return self._usual
        allowed = self._base.copy()
        allowed[ends] = False
        if self._prefix is not None and at is not None:
            beyond = self._prefix.beyond(at)
            beyond = beyond[allowed[beyond]]
            allowed.fill(False)
            allowed[beyond] = True
            allowed[self._prefix.inside(at)] = True
        return _pack(allowed, self._eos)

    def settled(self, emitted: Sequence[int]) -> bool:
        return not self._words and (self._prefix is None or self._prefix.reached(emitted) is None)

    def _word_ends(self, emitted: Sequence[int]) -> list[int]:
        """The tokens that would complete a bad word."""
        found = self._words.get(emitted[-1], []) if emitted else []
        return [word[-1] for word in found if list(emitted[1 - len(word) :]) == list(word[:-1])]


class ByteIndex:
    """The tokens of a vocabulary in order of their bytes."""

    def __init__(self, vocabulary: Sequence[bytes | None]) -> None:
        """A token without bytes is found by none of the look-ups."""
        known: list[bytes] = [raw or b"" for raw in vocabulary]
        order = sorted((number for number, raw in enumerate(known) if raw), key=known.__getitem__)
        self._ids: Ids = np.array(order, dtype=np.int64)
        self._sorted = [known[number] for number in order]
        self._lengths = [len(raw) for raw in known]
        self.longest = max(self._lengths, default=0)  # bytes

    def length(self, token: int) -> int:
        """Bytes."""
        return self._lengths[token] if token < len(self._lengths) else 0

    def equal(self, raw: bytes) -> Ids:
        first = bisect_left(self._sorted, raw)
        return self._ids[first : bisect_right(self._sorted, raw, first)]

    def longer(self, raw: bytes) -> Ids:
        """Those that begin with `raw` and go on."""
        first = bisect_right(self._sorted, raw)
        return self._ids[first : bisect_right(self._sorted, raw, first, key=lambda token: token[: len(raw)])]


class Prefix:
    """Bytes that a text has to begin with, however tokens cut them."""

    def __init__(self, text: bytes, index: ByteIndex) -> None:
        self._text, self._index = text, index
        # For each place, whether tokens can go on from there to the end or beyond it.
        self._open = [True] * (len(text) + 1)
        for at in range(len(text) - 1, -1, -1):
            rest = text[at:]
            self._open[at] = bool(len(index.equal(rest)) or len(index.longer(rest))) or any(
                self._open[end] and len(index.equal(text[at:end])) for end in self._ends(at)
            )

    def reached(self, emitted: Sequence[int]) -> int | None:
        """The place in it behind the tokens generated so far; None: they cover all of it."""
        at = 0
        for token in emitted:
            at += self._index.length(token)
            if at >= len(self._text):
                return None
        return at

    def inside(self, at: int) -> Ids:
        """The tokens that may come next at `at` and end in it, or together with it."""
        parts = [self._index.equal(self._text[at:end]) for end in self._ends(at) if self._open[end]]
        return np.concatenate([*parts, self._index.equal(self._text[at:])])

    def beyond(self, at: int) -> Ids:
        """Those that cover what is left of it and go on."""
        return self._index.longer(self._text[at:])

    def _ends(self, at: int) -> range:
        """Where a token from `at` can end before the prefix does."""
        return range(at + 1, min(len(self._text), at + self._index.longest + 1))


def _within(ids: Sequence[int], size: int) -> Ids:
    numbers = np.array(ids, dtype=np.int64)
    return numbers[(numbers >= 0) & (numbers < size)]


def _pack(allowed: Allowed, eos: Ids) -> bytes:
    if not allowed.any():
        if not len(eos):
            return b""
        allowed = allowed.copy()
        allowed[eos] = True
    return np.packbits(np.pad(allowed, (0, -len(allowed) % 32)), bitorder="little").tobytes()
