"""Bad words given as texts: the token sequences by which a model may write them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightllmd.errors import InvalidRequest
from lightllmd.text.interface import Tokenizer

# What a word may follow: texts of every tokenizer that seldom merge with one.
_BEFORE = ("\n", "1")


def bad_word_ids(words: Sequence[str], field: str, tokenizer: Tokenizer) -> list[list[int]]:
    """Of each word, without the white space that it begins with (unless it is nothing else): as it begins a text, and
    as it stands within one with and without a space before it. Raises InvalidRequest for a word that has no tokens."""
    found: dict[tuple[int, ...], None] = {}
    for number, word in enumerate(words):
        ways = [ids for ids in _ways(word.lstrip() or word, tokenizer) if ids]
        if not ways:
            raise InvalidRequest(f"{field}.{number}: {word!r} has no tokens", param=f"{field}.{number}")
        found.update(dict.fromkeys(ways))
    # One that ends in another one can't be completed anyway, and short ones are cheaper to prevent.
    return [list(ids) for ids in found if not any(ids[start:] in found for start in range(1, len(ids)))]


def _ways(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    yield tuple(tokenizer.encode(word, add_special_tokens=False))
    for before in _BEFORE:
        for text in (word, f" {word}"):
            try:
                lead = tokenizer.encode(before, add_special_tokens=False)
                whole = tokenizer.encode(before + text, add_special_tokens=False)
            except InvalidRequest:  # token ids as text can't be put together so
                continue
            if whole[: len(lead)] == lead:  # else they merged, and the word has no tokens of its own there
                yield tuple(whole[len(lead) :])
