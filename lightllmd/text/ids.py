"""The tokenizer of a model that has none: its text is token ids in decimal."""

from __future__ import annotations

from lightllmd.errors import InvalidRequest
from lightllmd.text.interface import Tokenizer
from lightllmd.text.vocabulary import Vocabulary


class IdTokenizer(Tokenizer):
    """``" 17 4 99"`` is ``[17, 4, 99]``: each id is preceded by a space, so that every token of a stream has a text.

    No id is special or hidden, not even those that end a generation, and there is no chat template.
    """

    def __init__(self, vocab_size: int) -> None:
        tokens: list[str | None] = [str(number) for number in range(vocab_size)]
        texts: list[str | None] = [f" {number}" for number in range(vocab_size)]
        super().__init__(Vocabulary(tokens, frozenset(), frozenset(), texts=texts))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self._number(word) for word in text.split()]

    def _number(self, word: str) -> int:
        # Few digits, because int() refuses thousands of them with an error of its own.
        if len(word) <= 20 and word.isascii() and word.isdecimal() and int(word) < self.vocab_size:
            return int(word)
        shown = word if len(word) <= 40 else word[:39] + "…"
        raise InvalidRequest(
            f"this model has no tokenizer, so text must be token ids in decimal, 0 … {self.vocab_size - 1}, with "
            f"spaces between them; got {shown!r}"
        )
