"""What the fake engine sees of images: their embeddings, by the slots that a KV cache would have them in, so that a
mix-up of slots or images is one of tokens."""

from __future__ import annotations

from lightllmd.engine.runners.fake_model import seen_tokens
from lightllmd.engine.step import Row, Step


class FakeSight:
    """What the KV cache has of images: by slot, what stands for the id of a token. Other slots are those of text."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def store(self, step: Step) -> None:
        """What the step feeds takes the place of what its slots held."""
        if self._seen:
            for slot in step.decode.slots:
                self._seen.pop(slot, None)
        for row in step.rows:
            if self._seen:
                for slot in row.slots:
                    self._seen.pop(slot, None)
            for part in row.images or ():
                slots = row.slots[part.first : part.first + part.rows]
                self._seen |= zip(slots, seen_tokens(part.values, part.layers, part.rows), strict=True)

    def tokens(self, row: Row) -> list[int]:
        """Those that it feeds, as they are seen."""
        return self.over(row.tokens, row.slots) if row.images else row.tokens

    def over(self, tokens: list[int], slots: list[int]) -> list[int]:
        """The tokens of these slots, as they are seen."""
        if not self._seen:
            return tokens
        return [self._seen.get(slot, token) for token, slot in zip(tokens, slots, strict=True)]

    def clear(self) -> None:
        """The cache is gone."""
        self._seen.clear()
