"""The text of hypotheses while a beam search makes them, and where a stop ends one.

The rules are those by which an api worker shows the sequence in the end: the same detokenizer, the same stops.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from lightllmd.errors import ConfigInvalid
from lightllmd.ipc.messages import SamplingParams
from lightllmd.text.detokenize import IncrementalDetokenizer
from lightllmd.text.interface import Tokenizer
from lightllmd.text.stop import StopList, StopMatcher

log = logging.getLogger(__name__)

_BODIES = 64  # whose stops are kept: the prompts of one body have the same


class DetokenizedHypothesis:
    """What a hypothesis says so far. It never changes: `after` makes another one, so that beams share their past."""

    __slots__ = ("_detokenizer", "_matcher", "_released", "_unshown")

    def __init__(
        self, detokenizer: IncrementalDetokenizer | None, matcher: StopMatcher, unshown: Mapping[int, str]
    ) -> None:
        """Without a detokenizer there is no text, and stop ids alone end it. `unshown`: as `Detokenizing.unshown`."""
        self._detokenizer, self._matcher, self._unshown = detokenizer, matcher, unshown
        self._released = ""

    def after(self, token: int) -> DetokenizedHypothesis:
        """With one token more. A token that no text can be made of (it's the request's fault) has none."""
        read = copy.copy(self)
        matcher = read._matcher = self._matcher.copy()
        text = ""
        if self._detokenizer is not None:
            detokenizer = read._detokenizer = self._detokenizer.copy()
            try:
                text = detokenizer.push((token,))
            except Exception:
                log.exception("token %d of a hypothesis can't be made text", token)
        read._released += matcher.push(text, (token,), self._unshown.get(token, ""))
        return read

    @property
    def stopped(self) -> bool:
        """See `beam_search.HypothesisText`."""
        return self._matcher.stopped

    @property
    def text(self) -> str | None:
        """As a client would see it if the hypothesis ended here; None where no text is made."""
        return None if self._detokenizer is None else self._released + self._matcher.held


class HypothesisTexts:
    """Opens them, one for each search."""

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        """`load` is called once, when the first stop text needs it or by `prepare`."""
        self._load = load
        self._tokenizer: Tokenizer | None = None
        self._stops = lru_cache(_BODIES)(lambda stops: StopList(stops.strings, stops.ids))

    def prepare(self) -> None:
        """Reads the tokenizer now, so that no request has to wait for it. Without one no stop text ends a hypothesis;
        where texts are made, the fault is told."""
        try:
            self._tokenizer = self._tokenizer or self._load()
        except ConfigInvalid as invalid:
            log.warning("beams can't look for stop texts: %s", invalid)

    def open(self, prompt_ids: Sequence[int], params: SamplingParams) -> DetokenizedHypothesis | None:
        """Of what continues the prompt; None where nothing but an eos ends it."""
        stops = params.stops
        if stops is None:
            return None
        matcher = StopMatcher(self._stops(stops), stops.include_stop, params.min_new_tokens)
        if stops.strings and self._tokenizer is None:
            self.prepare()
        if not stops.strings or self._tokenizer is None:
            return DetokenizedHypothesis(None, matcher, {})
        detokenizing = self._tokenizer.detokenizing(
            skip_special_tokens=stops.skip_special_tokens,
            spaces_between_special_tokens=stops.spaces_between_special_tokens,
            print_eos_token=stops.print_eos_token,
            marks=frozenset(stops.marks),
        )
        return DetokenizedHypothesis(detokenizing.open(prompt_ids), matcher, detokenizing.unshown)
