"""The log-probabilities of a prompt's tokens, as they come from the engine and as the dialects show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightllmd.ipc.messages import PromptLogprobs

FLOOR = -9999.0  # JSON has no -inf; OpenAI's own floor

Alternatives = Sequence[tuple[int, float]]  # best first


class PromptLog:
    """Entry i tells of prompt token i + 1; of token 0 there is nothing to tell."""

    __slots__ = ("_alternatives", "logprobs")

    def __init__(self) -> None:
        self.logprobs: list[float] = []
        self._alternatives: list[list[tuple[int, float]]] = []  # as many, or none where none were asked for

    def take(self, part: PromptLogprobs) -> bool:
        """What of it is new: an engine that goes on with another's request tells all from the beginning, in parts of
        its own. False: something is missing between this part and what is here."""
        known = 1 + len(self.logprobs) - part.first
        if known < 0:
            return False
        self.logprobs += part.logprobs[known:]
        if part.alternatives is not None:
            self._alternatives += part.alternatives[known:]
        return True

    def whole(self, prompt_ids: Sequence[int]) -> bool:
        """Whether all parts have come."""
        return len(self.logprobs) == len(prompt_ids) - 1

    @property
    def size(self) -> int:
        """Numbers in it."""
        return len(self.logprobs) + sum(map(len, self._alternatives))

    def alternatives(self, index: int) -> list[tuple[int, float]]:
        """To the token of entry `index`, best first."""
        return self._alternatives[index] if self._alternatives else []

    def pairs(self, prompt_ids: Sequence[int]) -> list[tuple[int, dict[str, float]]]:
        """As LightLLM shows them: each token but the last, and what may follow it: the one that does, then the others
        that were asked for."""
        return [
            (prompt_ids[index], {str(token): value for token, value in self._candidates(prompt_ids, index).items()})
            for index in range(len(self.logprobs))
        ]

    def ranked(
        self, prompt_ids: Sequence[int], text_of: Callable[[int], str]
    ) -> list[dict[str, dict[str, Any]] | None]:
        """As vLLM shows them: one entry per token, null for the first. A rank is 1 for the likeliest token, null where
        the token isn't among the alternatives."""
        shown: list[dict[str, dict[str, Any]] | None] = [None]
        for index in range(len(self.logprobs)):
            ranks = {token: rank for rank, (token, _) in enumerate(self.alternatives(index), 1)}
            shown.append(
                {
                    str(token): {"logprob": value, "rank": ranks.get(token), "decoded_token": text_of(token)}
                    for token, value in self._candidates(prompt_ids, index).items()
                }
            )
        return shown

    def _candidates(self, prompt_ids: Sequence[int], index: int) -> dict[int, float]:
        """The prompt's own token first."""
        own = {prompt_ids[index + 1]: max(self.logprobs[index], FLOOR)}
        return own | {token: max(value, FLOOR) for token, value in self.alternatives(index) if token not in own}
