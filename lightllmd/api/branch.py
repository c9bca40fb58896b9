"""One sequence of a request: the tokens that the ledger accepted and the text that the client may see of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE
from lightllmd.text.detokenize import IncrementalDetokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.stop import StopMatcher


@dataclass(frozen=True)
class TextOptions:
    """How tokens become text: where it stops and what of it is shown."""

    stop_strings: list[str] = field(default_factory=list)
    stop_ids: list[list[int]] = field(default_factory=list)
    include_stop: bool = True  # native output shows the stop text, OpenAI's does not
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    print_eos_token: bool = False


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


class _Silent:
    """A detokenizer for those who want no text."""

    def push(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""


def open_branches(
    count: int, prompt_ids: Sequence[int], options: TextOptions, tokenizer: Tokenizer | None, healing: bytes = b""
) -> list[Branch]:
    """Those of a request that continues `prompt_ids`. `healing`: see SamplingParams. Without a tokenizer they have no
    text."""
    branches = []
    for index in range(count):
        detokenizer: IncrementalDetokenizer = _Silent()
        if tokenizer is not None:
            detokenizer = tokenizer.detokenizer(
                prompt_ids,
                skip_special_tokens=options.skip_special_tokens,
                spaces_between_special_tokens=options.spaces_between_special_tokens,
                print_eos_token=options.print_eos_token,
                hidden=healing,
            )
        stop = None
        if options.stop_strings or options.stop_ids:
            stop = StopMatcher(options.stop_strings, options.stop_ids, options.include_stop)
        branches.append(Branch(index, detokenizer, stop))
    return branches
