"""One sequence of a request: the tokens that the ledger accepted and the text that the client may see of them."""

from __future__ import annotations

from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE
from lightllmd.text.detokenize import IncrementalDetokenizer
from lightllmd.text.stop import StopMatcher


class Branch:
    """Parallel lists, one entry per token. They only grow, and only by `take`; readers keep their own index.

    ``texts[i]`` is the text that token i released: "" while a UTF-8 sequence or a possible stop text is open. The ids
    are what a replay sends to the engine, whether or not their text was released yet.
    """

    __slots__ = ("_detokenizer", "_stop", "alternatives", "finish", "ids", "index", "logprobs", "texts")

    def __init__(self, index: int, detokenizer: IncrementalDetokenizer, stop: StopMatcher | None) -> None:
        self.index = index
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[list[tuple[int, float]] | None] = []
        self.texts: list[str] = []
        self.finish: str | None = None  # "stop" | "length" | "abort"
        self._detokenizer = detokenizer
        self._stop = stop

    def take(
        self, token: int, logprob: float, alternatives: list[tuple[int, float]] | None, finish: int = FINISH_NONE
    ) -> bool:
        """Accepts the next token. True when its text completed a stop text, so that the engine must be told."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.alternatives.append(alternatives)
        text = self._detokenizer.push((token,))
        if finish != FINISH_NONE:
            text += self._detokenizer.flush()
        stop = self._stop
        if stop is not None:
            text = stop.push(text, (token,))
            if stop.stopped:
                self.finish = "stop"
            elif finish != FINISH_NONE:
                text += stop.flush()
        self.texts.append(text)
        if self.finish is None and finish != FINISH_NONE:
            self.finish = "length" if finish == FINISH_LENGTH else "stop"
        return stop is not None and stop.stopped and finish == FINISH_NONE

    def abort(self) -> None:
        """Ends it where it is, if it hasn't ended; text that is held back (see above) stays unsaid."""
        if self.finish is None:
            self.finish = "abort"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.logprobs)
