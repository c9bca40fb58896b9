"""What each token id adds to a text: plain data that a tokenizer builds once and every detokenizer reads."""

from __future__ import annotations

import codecs
import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

SPACE_MARK = "\u2581"  # sentencepiece's visible space
MAX_TOKENS = 1 << 22  # of a vocabulary; tables by id are made, so that one huge id would take all memory
BYTEWISE = "lightllmd.bytewise"  # codec error handler: one U+FFFD per invalid byte, as sentencepiece decodes


def _replace_bytewise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(BYTEWISE, _replace_bytewise)


class LeadingSpace(enum.Enum):
    """What becomes of the space with which the first token of a text begins."""

    KEEP = "keep"
    STRIP_ONE = "strip one"  # it stands for the one that encoding put in front
    STRIP_ALL = "strip all"  # encoding removes extra white space, so decoding starts with none


@dataclass
class Vocabulary:
    """Immutable after construction.

    Two kinds exist. With ``decode = None`` each token has a text of its own (byte-level and sentencepiece
    vocabularies): ``texts[id]``, or None where its bytes are no whole UTF-8, then they are ``fragments[id]``.
    With `decode` set the text of a token depends on the tokens beside it; `texts` is empty then.
    """

    tokens: list[str | None]  # by id, as the model's files write them; None: no token has this id
    special_ids: frozenset[int]  # not shown under skip_special_tokens
    added_ids: frozenset[int]  # matched in a text as a whole; includes the special ones
    texts: list[str | None] = field(default_factory=list)
    fragments: dict[int, bytes] = field(default_factory=dict)
    byte_errors: str = "replace"  # codec error handler for invalid UTF-8
    leading_space: LeadingSpace = LeadingSpace.KEEP
    decode: Callable[[list[int]], str] | None = None
    _shown: dict[frozenset[int], list[str | None]] = field(default_factory=dict, repr=False)

    def shown_texts(self, hidden: frozenset[int]) -> list[str | None]:
        """`texts` with "" for the hidden ids. Few option sets exist, so each table is made once and kept."""
        table = self._shown.get(hidden)
        if table is None:
            table = list(self.texts)
            for number in hidden:
                if 0 <= number < len(table):
                    table[number] = ""
            self._shown[hidden] = table
        return table

    def token_text(self, token_id: int) -> str:
        """An added token's own text."""
        text = self.texts[token_id] if self.decode is None else self.tokens[token_id]
        return text if text is not None else self.fragments[token_id].decode("utf-8", "replace")

    def text_length(self, token_id: int) -> int | None:
        """Characters of a token's own text; None where that depends on the tokens beside it."""
        text = self.texts[token_id] if 0 <= token_id < len(self.texts) else None
        return None if text is None else len(text)

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that the token adds to a text; None for an id that is no token, or has no text of its own."""
        if not 0 <= token_id < len(self.texts):
            return None
        text = self.texts[token_id]
        return self.fragments.get(token_id) if text is None else text.encode()


def split_texts(raw: Iterable[bytes]) -> tuple[list[str | None], dict[int, bytes]]:
    """(texts, fragments) of tokens given as bytes, in the order of their ids."""
    texts: list[str | None] = []
    fragments: dict[int, bytes] = {}
    for number, token in enumerate(raw):
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            texts.append(None)
            fragments[number] = token
    return texts, fragments


def _byte_alphabet() -> dict[int, int]:
    """Code point -> byte of GPT-2's printable byte alphabet; code points below 256 outside it -> U+FFFF (no byte)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {256 + rank: byte for rank, byte in enumerate(others)} | dict.fromkeys(others, 0xFFFF)


_ALPHABET = _byte_alphabet()


def byte_level_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for (Radford et al. 2019, "bytes_to_unicode").

    A token with a character outside the alphabet stands for itself, as in `tokenizers`' ByteLevel decoder.
    """
    try:
        return token.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()


def byte_level_texts(tokens: Sequence[str | None]) -> tuple[list[str | None], dict[int, bytes]]:
    """(texts, fragments) of byte-level tokens, in the order of their ids; None: an id that is no token."""
    return split_texts(b"" if token is None else byte_level_bytes(token) for token in tokens)


def sentencepiece_texts(
    pieces: Sequence[str | None], byte_ids: Iterable[int]
) -> tuple[list[str | None], dict[int, bytes]]:
    """(texts, fragments) of sentencepiece pieces, of which `byte_ids` are written ``<0xHH>``.

    Every byte piece is a fragment, even an ASCII one: a leading space that comes from a byte piece is never stripped.
    """
    texts: list[str | None] = ["" if piece is None else piece.replace(SPACE_MARK, " ") for piece in pieces]
    fragments = {}
    for number in byte_ids:
        texts[number] = None
        fragments[number] = bytes([int(str(pieces[number])[3:5], 16)])
    return texts, fragments


def require_token_id(number: int) -> None:
    """Raises ValueError for an id that no vocabulary reaches."""
    if not 0 <= number < MAX_TOKENS:
        raise ValueError(f"token id {number} is out of bounds: 0 … {MAX_TOKENS - 1}")
