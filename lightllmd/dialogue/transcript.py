"""What one sequence of a request says, as events."""

from __future__ import annotations

from lightllmd.dialogue.events import CallBegun, Event
from lightllmd.dialogue.parser import Parser
from lightllmd.requests.branch import Branch


class Transcript:
    """Reads each token's text once, as it comes or all at the end. Its state is the front end's own, as the branch is:
    engines may come and go."""

    __slots__ = ("_branch", "_ended", "_parser", "_read", "calls", "reasoning_tokens")

    def __init__(self, branch: Branch, parser: Parser) -> None:
        self._branch = branch
        self._parser = parser
        self._read = 0  # tokens
        self._ended = False
        self.calls = 0  # begun so far
        self.reasoning_tokens = 0  # that were generated within reasoning, the marks included

    def take(self) -> list[Event]:
        """What came since the last call; with the branch's end all that was held back."""
        branch, parser = self._branch, self._parser
        events: list[Event] = []
        texts, reasoning = branch.texts, parser.reasoning
        for index in range(self._read, len(texts)):
            new = parser.feed(texts[index])
            if reasoning or parser.reasoning:
                self.reasoning_tokens += 1
                reasoning = parser.reasoning
            events += new
        self._read = len(texts)
        if branch.finish is not None and not self._ended:
            self._ended = True
            events += parser.end()
        for event in events:
            if type(event) is CallBegun:
                self.calls += 1
        return events

    @property
    def finish(self) -> str | None:
        """As `Branch.finish`, but "tool_calls" where the model ended by itself and has called a tool."""
        finish = self._branch.finish
        return "tool_calls" if finish == "stop" and self.calls else finish
