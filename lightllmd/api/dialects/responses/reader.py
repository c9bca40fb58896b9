"""Reads a generated sequence as it grows: its text through the parser of the model's format into items of output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lightllmd.api.dialects.responses.output import Logprobs, OutputItems, StreamEvent
from lightllmd.dialogue.events import CallEnded, Content
from lightllmd.dialogue.parser import Parser, PlainParser
from lightllmd.requests.branch import Branch
from lightllmd.requests.prompt_log import FLOOR
from lightllmd.text.interface import Tokenizer


class SequenceReader:
    """Of one sequence. It goes token by token where a parser is at work or tokens are shown, so that each is counted
    and told with its text."""

    def __init__(
        self,
        branch: Branch,
        parsers: Callable[[], Parser] | None,
        *,
        summaries: bool = False,
        shown: Callable[[Branch, int], dict[str, Any]] | None = None,
    ) -> None:
        """`parsers`: see AdmittedJob. `shown`: the log-probability of the token at an index; None: they aren't told."""
        self.branch = branch
        self.output = OutputItems(summaries=summaries)
        self.reasoning = 0  # tokens that were reasoning
        self._parser: Parser = PlainParser() if parsers is None else parsers()
        self._shown = shown
        self._by_token = parsers is not None or shown is not None
        self._read = 0  # tokens
        self._held: Logprobs = []  # of tokens whose text the parser holds back

    @property
    def begun(self) -> bool:
        """Whether a token came."""
        return self._read > 0

    def advance(self) -> Iterator[StreamEvent]:
        """What came since the last call; nothing is noted unless it is read to its end."""
        first, count = self._read, len(self.branch.ids)
        self._read = count
        if self._by_token:
            for index in range(first, count):
                yield from self._token(index)
        elif text := "".join(self.branch.texts[first:count]):
            yield from self.output.take(self._parser.feed(text))

    def end(self) -> Iterator[StreamEvent]:
        """After the last token. A sequence that was cut ends in an item that is not complete."""
        yield from self.advance()
        cut = self.branch.finish != "stop"
        for event in self._parser.end():
            if not (cut and isinstance(event, CallEnded)):
                yield from self.output.take([event], self._told([event]))
        yield from self.output.end("incomplete" if cut else "completed")

    def _token(self, index: int) -> Iterator[StreamEvent]:
        before = self._parser.reasoning
        events = self._parser.feed(self.branch.texts[index])
        if before or self._parser.reasoning:
            self.reasoning += 1
        if self._shown is not None:
            self._held.append(self._shown(self.branch, index))
        if events:
            yield from self.output.take(events, self._told(events))

    def _told(self, events: list[Any]) -> Logprobs | None:
        """The held ones, if there is content that they belong to; those of reasoning and calls are for no reader."""
        held, self._held = self._held, []
        return held if any(isinstance(event, Content) for event in events) else None


def token_logprobs(tokenizer: Tokenizer, alternatives: int) -> Callable[[Branch, int], dict[str, Any]]:
    """How a token's log-probability is told, with so many alternatives."""

    def token(number: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(number)
        text = tokenizer.id_to_token(number) or "" if raw is None else raw.decode("utf-8", "replace")
        return {"token": text, "bytes": list(raw or b""), "logprob": max(logprob, FLOOR)}

    def told(branch: Branch, index: int) -> dict[str, Any]:
        others = (branch.alternatives[index] or [])[:alternatives]
        top = [token(*other) for other in others]
        return token(branch.ids[index], branch.logprobs[index]) | {"top_logprobs": top}

    return told
