"""Bad words given as texts: the token sequences by which a model may write them."""

from __future__ import annotations

from collections.abc import Iterator

from lightllmd.errors import InvalidRequest
from lightllmd.text.interface import Tokenizer

# What a word may follow: characters that don't merge with a letter behind them, each in some tokenizers.
_BEFORE = ("\n", ".", "1")


def bad_word_ids(words: list[str], tokenizer: Tokenizer, field: str) -> list[list[int]]:
    """Of each word, without its leading white space: as it begins a text, and as it stands within one with and without
    a space before it. Raises InvalidRequest for a word that no token writes."""
    found: dict[tuple[int, ...], None] = {}
    for number, word in enumerate(words):
        ways = [ways for ways in _ways(word.lstrip(), tokenizer) if ways] if word.strip() else []
        if not ways:
            raise InvalidRequest(f"{field}.{number}: {word!r} has no tokens", param=f"{field}.{number}")
        found.update(dict.fromkeys(ways))
    return [list(ids) for ids in found]


def _ways(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    yield tuple(tokenizer.encode(word, add_special_tokens=False))
    for before in _BEFORE:
        for text in (word, f" {word}"):
            lead = tokenizer.encode(before, add_special_tokens=False)
            whole = tokenizer.encode(before + text, add_special_tokens=False)
            if whole[: len(lead)] == lead:  # else they merged, and the word has no tokens of its own there
                yield tuple(whole[len(lead) :])
