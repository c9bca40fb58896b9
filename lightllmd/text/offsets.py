"""Where in a text each of its tokens begins."""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Iterable, Sequence

Span = tuple[int, int]  # first character, one past the last
NOWHERE = (0, 0)  # of a token that stands for no character of the text

_SLACK = 32  # characters that a token without a match may stand for


def token_offsets(
    text: str, pieces: Sequence[str], spans: Sequence[Span] | None = None, special: Container[int] = ()
) -> list[int]:
    """The character of `text` that each token begins at.

    `pieces`: what each token shows, special ones too; "" while the bytes of a character are incomplete. They need not
    add up to `text`: a tokenizer may put tokens around it (those begin where the next one does), a space before it,
    and normalise it (NFC and the like). A token behind one that was changed begins where it is found, or where its span
    says. `spans` are one per token; white space may be missing at their ends. `special`: indices of special tokens.
    """
    offsets: list[int] = []
    at, lost = 0, False
    for index, piece in enumerate(pieces):
        start, end = spans[index] if spans is not None else (at, at)
        if lost:
            farthest = at + _SLACK if spans is None else start
            found = text.find(piece, at, farthest + len(piece)) if piece else -1
            lead = len(piece) - len(piece.lstrip(" "))
            if found < 0 and text[start - lead : start] == " " * lead:
                start -= lead
            at = found if found >= 0 else max(at, start)
            lost = found < 0 and spans is None
        offsets.append(at)
        if not piece or (spans is not None and spans[index] == NOWHERE and not piece.isspace()):
            continue
        length = _matching(text, at, piece)
        if length is not None:
            at, lost = at + length, False
        elif index not in special:
            at, lost = max(at, end), True
    return offsets


def _matching(text: str, at: int, piece: str) -> int | None:
    """Characters of the text from `at` on that the piece stands for; None: it is not there."""
    if text.startswith(piece, at):
        return len(piece)
    if piece[0] == " " and not text.startswith(" ", at):
        piece = piece[1:]  # the space that a tokenizer puts before a text
    if text.startswith(piece, at):
        return len(piece)
    plain = _plain(piece)
    return next((length for length in range(1, _SLACK) if _plain(text[at : at + length]) == plain), None)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


def begins(gained: Iterable[int], own: Iterable[int | None], at: int = 0) -> list[int]:
    """The character that each token of a decoded text begins at, the first one at `at`. Of each: by how many characters
    the text had grown when it was decoded, and how many it has itself; None: it may share one with others.

    What the text grew by beyond a token's own characters was left by tokens before it: bytes that made no character.
    """
    offsets = []
    for growth, length in zip(gained, own, strict=True):
        offsets.append(at if length is None else at + max(0, growth - length))
        at += growth
    return offsets
