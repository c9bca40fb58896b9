"""Token ids to text, piece by piece: what is pushed and flushed adds up to the decoding of all ids at once.

Nothing released is ever taken back, and no incomplete UTF-8 sequence is released: its bytes wait for the next token.
The state belongs to the keeper of the emitted tokens (the api worker's ledger). It outlives engine generations, so a
replay needs nothing here: the next token of the next generation is pushed as if nothing had happened.
"""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Sequence
from typing import Protocol, Self

from lightllmd.text.vocabulary import BYTEWISE, LeadingSpace, Vocabulary


class IncrementalDetokenizer(Protocol):
    """One generation's text, released as its tokens come."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; may be ""."""
        ...

    def flush(self) -> str:
        """What still waits, at the end of the generation. Incomplete UTF-8 comes out as U+FFFD."""
        ...

    def copy(self) -> Self:
        """Another one that goes on from here."""
        ...


class Detokenizing:
    """How ids become text under one set of options. `open` costs the same whatever the vocabulary's size."""

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int], *, separate_added: bool) -> None:
        """The `hidden` ids are left out. `separate_added` puts a space between an added token that is shown and the
        tokens beside it."""
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._separated = vocabulary.added_ids - hidden if separate_added else None
        tokens = vocabulary.tokens
        self.unshown = {number: tokens[number] or "" for number in hidden if 0 <= number < len(tokens)}

    def open(self, prompt_ids: Sequence[int] = (), healed: bytes = b"") -> IncrementalDetokenizer:
        """`prompt_ids` are what the text continues: the first piece is then what ``decode(prompt + output)`` has beyond
        ``decode(prompt)``. The output begins with the bytes `healed`, which are the prompt's and not shown again."""
        vocabulary, hidden, separated = self._vocabulary, self._hidden, self._separated
        context = [number for number in prompt_ids[-_CONTEXT_SCAN:] if number not in hidden][-_CONTEXT:]

        def stream(begun: bool = False) -> IncrementalDetokenizer:
            run = _plain_stream(vocabulary, hidden, context, begun=bool(healed))
            return SeparatedStream(vocabulary, hidden, separated, run, begun) if separated else run

        return HealedStream(vocabulary, prompt_ids, healed, stream) if healed else stream()


def _plain_stream(
    vocabulary: Vocabulary, hidden: frozenset[int], context: list[int], begun: bool = False
) -> IncrementalDetokenizer:
    """`begun`: it goes on with a text, even where that has no token in the context."""
    if vocabulary.decode is not None:
        return WindowStream(vocabulary, hidden, context)
    return TableStream(vocabulary, hidden, LeadingSpace.KEEP if context or begun else vocabulary.leading_space)


class TableStream(IncrementalDetokenizer):
    """For vocabularies whose tokens have texts of their own: a table look-up, and bytes that wait for their rest."""

    __slots__ = ("_errors", "_fragments", "_lead", "_open", "_texts", "_waiting")

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int], lead: LeadingSpace) -> None:
        self._texts = vocabulary.shown_texts(hidden)
        self._fragments = vocabulary.fragments
        self._errors = vocabulary.byte_errors
        self._lead = lead
        self._waiting = b""  # an incomplete UTF-8 sequence, at most three bytes
        self._open = lead is not LeadingSpace.KEEP  # bytes wait, or the text has not begun: no look-up is enough

    def push(self, ids: Sequence[int]) -> str:
        if not self._open:
            try:
                if len(ids) == 1:
                    text = self._texts[ids[0]]
                    if text is not None:
                        return text
                else:
                    texts = self._texts
                    parts = [texts[number] for number in ids]
                    if None not in parts:
                        return "".join(parts)  # type: ignore[arg-type]
            except IndexError:  # a row of the embedding that is no token
                pass
        return self._push_carefully(ids)

    def _push_carefully(self, ids: Sequence[int]) -> str:
        out = []
        count = len(self._texts)
        for number in ids:
            text = self._texts[number] if 0 <= number < count else ""
            if text is None:
                self._lead = LeadingSpace.KEEP
                out.append(self._take_bytes(self._fragments[number]))
            elif text:
                if self._waiting:
                    out.append(self._give_up_waiting())
                out.append(self._strip(text) if self._lead is not LeadingSpace.KEEP else text)
            elif self._waiting and self._errors == BYTEWISE:  # sentencepiece: a token without text parts bytes, too
                out.append(self._give_up_waiting())
        self._open = bool(self._waiting) or self._lead is not LeadingSpace.KEEP
        return "".join(out)

    def _take_bytes(self, raw: bytes) -> str:
        data = self._waiting + raw
        text, used = codecs.utf_8_decode(data, self._errors, False)
        self._waiting = data[used:]
        return text

    def _give_up_waiting(self) -> str:
        text, _ = codecs.utf_8_decode(self._waiting, self._errors, True)
        self._waiting = b""
        return text

    def _strip(self, text: str) -> str:
        stripped = text.removeprefix(" ")
        if self._lead is LeadingSpace.STRIP_ONE or stripped:
            self._lead = LeadingSpace.KEEP
        return stripped

    def flush(self) -> str:
        text = self._give_up_waiting()
        self._open = self._lead is not LeadingSpace.KEEP
        return text

    def copy(self) -> Self:
        return copy.copy(self)


_CHARACTER = 4  # bytes at most
_CONTEXT = 6  # tokens kept before the ones whose text is still to come
_CONTEXT_SCAN = 64  # of the prompt's last tokens, those shown are searched for context
_PATIENCE = 8  # tokens that may wait for the end of a UTF-8 sequence, which has at most four bytes


class WindowStream(IncrementalDetokenizer):
    """For decoders that look at the tokens beside (WordPiece, Metaspace, …): decodes a window of recent tokens twice.

    What a token adds is the difference between the window's text with and without it.
    """

    def __init__(self, vocabulary: Vocabulary, hidden: frozenset[int], context: list[int]) -> None:
        if vocabulary.decode is None:
            raise ValueError("this vocabulary has a text per token")
        self._decode = vocabulary.decode
        self._hidden = hidden
        self._window = list(context)
        self._settled = len(self._window)  # tokens of the window whose text was released
        self._before = self._decode(self._window) if self._window else ""

    def push(self, ids: Sequence[int]) -> str:
        self._window = self._window + [number for number in ids if number not in self._hidden]
        waiting = len(self._window) - self._settled
        if not waiting:
            return ""
        text = self._decode(self._window)
        if text.endswith("\ufffd") and waiting < _PATIENCE:
            return ""
        return self._release(text)

    def _release(self, text: str) -> str:
        new = text[len(self._before) :]
        self._window = self._window[-_CONTEXT:]
        self._settled = len(self._window)
        self._before = self._decode(self._window) if self._window else ""
        return new

    def flush(self) -> str:
        if len(self._window) == self._settled:
            return ""
        return self._release(self._decode(self._window))

    def copy(self) -> Self:
        return copy.copy(self)  # the window is replaced, never changed


class SeparatedStream(IncrementalDetokenizer):
    """Spaces around added tokens; each run between two added tokens is a text of its own."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        hidden: frozenset[int],
        separated: frozenset[int],
        run: IncrementalDetokenizer,
        begun: bool,
    ) -> None:
        self._vocabulary = vocabulary
        self._hidden = hidden
        self._separated = separated
        self._run = run  # of the tokens since the last added one
        self._begun = begun  # something was shown
        self._after_added = False  # and the last of it was an added token

    def push(self, ids: Sequence[int]) -> str:
        out = []
        for number in ids:
            if number in self._separated:
                out.append(self._run.flush())
                if self._begun:
                    out.append(" ")
                out.append(self._vocabulary.token_text(number))
                self._begun = self._after_added = True
            elif number not in self._hidden:
                if self._after_added:
                    out.append(" ")
                    self._run = _plain_stream(self._vocabulary, self._hidden, [])
                    self._after_added = False
                self._begun = True
                out.append(self._run.push([number]))
        return "".join(out)

    def flush(self) -> str:
        return self._run.flush()

    def copy(self) -> Self:
        other = copy.copy(self)
        other._run = self._run.copy()
        return other


class HealedStream(IncrementalDetokenizer):
    """An output that begins with the prompt's last bytes, which are left out, however its tokens cut them.

    Bytes are decoded here until the first whole character behind them; the rest is left to `open_rest`, which is told
    whether any text was shown. Where the prompt ended inside a character, that one is shown whole.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        prompt_ids: Sequence[int],
        healed: bytes,
        open_rest: Callable[[bool], IncrementalDetokenizer],
    ) -> None:
        if vocabulary.decode is not None:
            raise ValueError("tokens of this vocabulary have no bytes of their own")
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")(vocabulary.byte_errors)
        before = b"".join(vocabulary.token_bytes(number) or b"" for number in prompt_ids[-_CHARACTER:])
        self._decoder.decode(before + healed)  # what the prompt shows, but for an incomplete character
        self._left = len(healed)  # bytes still to be left out
        self._open_rest = open_rest
        self._rest: IncrementalDetokenizer | None = None
        self._begun = False  # something was shown

    def push(self, ids: Sequence[int]) -> str:
        if self._rest is not None:
            return self._rest.push(ids)
        out: list[str] = []
        for index, number in enumerate(ids):
            if self._left == 0 and number in self._vocabulary.added_ids:
                return "".join(out) + self._end() + self._go_on(ids[index:])
            raw = b"" if number in self._vocabulary.special_ids else self._vocabulary.token_bytes(number) or b""
            beyond = raw[self._left :]
            self._left = max(0, self._left - len(raw))
            out.append(self._decoder.decode(beyond))
            self._begun = self._begun or bool(out[-1])
            if self._left == 0 and not self._decoder.getstate()[0]:
                return "".join(out) + self._go_on(ids[index + 1 :])
        return "".join(out)

    def _end(self) -> str:
        """Gives up what waits."""
        text = self._decoder.decode(b"", True)
        self._begun = self._begun or bool(text)
        return text

    def _go_on(self, ids: Sequence[int]) -> str:
        self._rest = self._open_rest(self._begun)
        return self._rest.push(ids)

    def flush(self) -> str:
        if self._rest is not None:
            return self._rest.flush()
        return self._end() if self._left == 0 else ""

    def copy(self) -> Self:
        other = copy.copy(self)
        other._decoder = codecs.getincrementaldecoder("utf-8")(self._vocabulary.byte_errors)
        other._decoder.setstate(self._decoder.getstate())
        other._rest = None if self._rest is None else self._rest.copy()
        return other
