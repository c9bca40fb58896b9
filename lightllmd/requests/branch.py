"""One sequence of a request: the tokens that the ledger accepted and the text that the client may see of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE, TextStops
from lightllmd.text.detokenize import IncrementalDetokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.stop import StopList, StopMatcher

_ALL_SHOWN: Mapping[int, str] = {}


@dataclass(frozen=True)
class TextOptions:
    """How tokens become text: where it stops and what of it is shown."""

    stops: StopList = field(default_factory=StopList)
    include_stop: bool = True  # native output shows the stop text, OpenAI's does not
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    print_eos_token: bool = False
    marks: frozenset[str] = frozenset()  # tokens by their text that are shown even where they are special
    min_tokens: int = 1  # before so many no stop ends it
    prompt_only: bool = False  # it ends without a token: the prompt's log-probabilities are what was asked for

    def for_search(self) -> TextStops | None:
        """What a beam search has to know of it."""
        if not self.stops or self.prompt_only:
            return None
        return TextStops(
            tuple(self.stops.strings),
            tuple(map(tuple, self.stops.ids)),
            self.include_stop,
            self.skip_special_tokens,
            self.spaces_between_special_tokens,
            self.print_eos_token,
            tuple(sorted(self.marks)),
        )


class Branch:
    """Parallel lists, one entry per token. They only grow, and only by `take`; readers keep their own index.

    ``texts[i]`` is the text that token i released: "" while a UTF-8 sequence or a possible stop text is open. The ids
    are what a replay sends to the engine, whether or not their text was released yet.
    """

    __slots__ = (
        "_decoded",
        "_detokenizer",
        "_stop",
        "alternatives",
        "finish",
        "ids",
        "index",
        "logprobs",
        "prompt_only",
        "texts",
        "unshown",
    )

    def __init__(
        self,
        index: int,
        detokenizer: IncrementalDetokenizer,
        stop: StopMatcher | None,
        unshown: Mapping[int, str] = _ALL_SHOWN,
        *,
        prompt_only: bool = False,
    ) -> None:
        """`unshown`: the texts of tokens that the detokenizer leaves out, by id; a stop may hold them."""
        self.index = index
        self.prompt_only = prompt_only  # as TextOptions
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.alternatives: list[list[tuple[int, float]] | None] = []
        self.texts: list[str] = []
        self.finish: str | None = None  # "stop" | "length" | "abort"
        self._detokenizer = detokenizer
        self._stop = stop
        self._decoded: list[int] = []  # characters, per token, before `_stop` held any back; unused without it
        self.unshown = unshown

    def take(
        self, token: int, logprob: float, alternatives: list[tuple[int, float]] | None, finish: int = FINISH_NONE
    ) -> bool:
        """Accepts the next token. True when its text completed a stop text, so that the engine must be told."""
        if self.prompt_only:  # it only tells that the prompt has been run
            self.finish = "length"
            return finish == FINISH_NONE
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.alternatives.append(alternatives)
        text = self._detokenizer.push((token,))
        if finish != FINISH_NONE:
            text += self._detokenizer.flush()
        stop = self._stop
        if stop is not None:
            self._decoded.append(len(text))
            text = stop.push(text, (token,), self.unshown.get(token, ""))
            if stop.stopped:
                self.finish = "stop"
            elif finish != FINISH_NONE:
                text += stop.flush()
        self.texts.append(text)
        if self.finish is None and finish != FINISH_NONE:
            self.finish = "length" if finish == FINISH_LENGTH else "stop"
        return stop is not None and stop.stopped and finish == FINISH_NONE

    @property
    def stopped(self) -> bool:
        """Whether one of its stops ended it, rather than an eos or its length."""
        return self._stop is not None and self._stop.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop text that ended it; None: none did."""
        found = None if self._stop is None else self._stop.found
        return found if isinstance(found, str) else None

    def abort(self) -> None:
        """Ends it where it is, if it hasn't ended; text that is held back (see above) stays unsaid."""
        if self.finish is None:
            self.finish = "abort"

    def decoded_lengths(self, first: int, end: int) -> list[int]:
        """By how many characters each of these tokens made the text grow, whether or not a stop holds them back."""
        return [len(text) for text in self.texts[first:end]] if self._stop is None else self._decoded[first:end]

    @property
    def text(self) -> str:
        """What the client may see so far."""
        return "".join(self.texts)

    @property
    def cumulative_logprob(self) -> float:
        """Of all its tokens."""
        return sum(self.logprobs)


class _Silent:
    """A detokenizer for those who want no text."""

    def push(self, ids: Sequence[int]) -> str:
        return ""

    def flush(self) -> str:
        return ""

    def copy(self) -> _Silent:
        return self


def open_branches(
    count: int, prompt_ids: Sequence[int], options: TextOptions, tokenizer: Tokenizer | None, healing: bytes = b""
) -> list[Branch]:
    """Those of a request that continues `prompt_ids`. `healing`: see SamplingParams. Without a tokenizer they have no
    text."""
    detokenizing = None
    if tokenizer is not None:
        detokenizing = tokenizer.detokenizing(
            skip_special_tokens=options.skip_special_tokens,
            spaces_between_special_tokens=options.spaces_between_special_tokens,
            print_eos_token=options.print_eos_token,
            marks=options.marks,
        )
    branches = []
    for index in range(count):
        stop = StopMatcher(options.stops, options.include_stop, options.min_tokens) if options.stops else None
        detokenizer: IncrementalDetokenizer = _Silent()
        unshown = _ALL_SHOWN
        if detokenizing is not None:
            detokenizer, unshown = detokenizing.open(prompt_ids, healing), detokenizing.unshown
        branches.append(Branch(index, detokenizer, stop, unshown, prompt_only=options.prompt_only))
    return branches
