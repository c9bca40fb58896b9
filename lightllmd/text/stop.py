"""Where a generation ends because of what it said: stop texts across token borders, and stop id sequences.

The stop that is complete first ends the sequence; of several that end at the same character the longest. That choice
does not depend on how the text was cut into tokens, so a stream, its replay and a non-streaming answer agree.
Method: Aho & Corasick 1975, "Efficient string matching": time linear in the text, whatever the stops are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

from lightllmd.errors import InvalidRequest

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters, or ids

Symbol = TypeVar("Symbol", bound=Hashable)


class _Automaton(Generic[Symbol]):
    """Patterns as a trie with failure links. A state's depth is the length of the longest suffix of what was read
    that a pattern begins with; `longest[state]` is the length of the longest pattern that ends there, or 0."""

    def __init__(self, patterns: Iterable[Sequence[Symbol]]) -> None:
        self._edges: list[dict[Symbol, int]] = [{}]
        self.depth = [0]
        self.longest = [0]
        for pattern in patterns:
            state = 0
            for symbol in pattern:
                following = self._edges[state].get(symbol)
                if following is None:
                    following = self._edges[state][symbol] = len(self._edges)
                    self._edges.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.longest.append(0)
                state = following
            self.longest[state] = len(pattern)
        self._link()

    def _link(self) -> None:
        self._failure = [0] * len(self._edges)
        queue = deque(self._edges[0].values())
        while queue:  # breadth first: a state's failure link is shallower, hence already known
            state = queue.popleft()
            for symbol, child in self._edges[state].items():
                self._failure[child] = self.step(self._failure[state], symbol)
                self.longest[child] = self.longest[child] or self.longest[self._failure[child]]
                queue.append(child)

    def step(self, state: int, symbol: Symbol) -> int:
        while state and symbol not in self._edges[state]:
            state = self._failure[state]
        return self._edges[state].get(symbol, 0)


class StopMatcher:
    """For one sequence. Push each token's text with its id, one token a call; it returns what may be released.

    With `include_stop` the released text ends with the stop. Without, it ends right before it, and any suffix that may
    yet become a stop is held back. What comes after the stop, in the same token too, is never released.
    """

    def __init__(
        self,
        stop_strings: Sequence[str] = (),
        stop_id_sequences: Sequence[Sequence[int]] = (),
        include_stop: bool = True,
    ) -> None:
        """Raises InvalidRequest for an empty stop, one that is too long, or too many."""
        if len(stop_strings) + len(stop_id_sequences) > MAX_STOPS:
            raise InvalidRequest(f"{len(stop_strings) + len(stop_id_sequences)} stop sequences, at most {MAX_STOPS}")
        for stop in (*stop_strings, *stop_id_sequences):
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise InvalidRequest(f"a stop sequence has length {len(stop)}, must be 1 to {MAX_STOP_LENGTH}")
        self._chars: _Automaton[str] | None = _Automaton(stop_strings) if stop_strings else None
        self._ids: _Automaton[int] | None = _Automaton(stop_id_sequences) if stop_id_sequences else None
        self._include = include_stop
        self._char_state = 0
        self._id_state = 0
        self._held = ""
        self._released = 0  # characters; `_held` begins there
        self._starts: deque[int] = deque(maxlen=max((len(stop) for stop in stop_id_sequences), default=1))
        #   where the text of each of the last tokens begins, in characters from the start
        self.stopped = False
        self.tokens = 0  # tokens up to and including the one that completed the stop; those after it don't count

    def push(self, text: str, ids: Sequence[int] = ()) -> str:
        """`text` is what `ids` (one token; none for a detokenizer's last words) added. Returns "" once stopped."""
        if self.stopped:
            return ""
        start = self._released + len(self._held)
        self._held += text
        self.tokens += len(ids)
        found = self._find_text(text, start) or self._find_ids(ids, start)
        if found is None:
            return self._release(self._safe_end())
        begin, end = found
        self.stopped = True
        text = self._release(end if self._include else begin)
        self._held = ""
        return text

    def _find_text(self, text: str, start: int) -> tuple[int, int] | None:
        """The first stop text that ends within `text`, as (first, one past the last) character."""
        if self._chars is None:
            return None
        state, step, longest = self._char_state, self._chars.step, self._chars.longest
        for end, char in enumerate(text, start + 1):
            state = step(state, char)
            if longest[state]:
                return end - longest[state], end
        self._char_state = state
        return None

    def _find_ids(self, ids: Sequence[int], start: int) -> tuple[int, int] | None:
        """The stop id sequence that these ids complete, as the characters that its tokens added."""
        if self._ids is None:
            return None
        for number in ids:
            self._starts.append(start)
            self._id_state = self._ids.step(self._id_state, number)
            length = self._ids.longest[self._id_state]
            if length:
                return self._starts[-length], self._released + len(self._held)
        return None

    def _safe_end(self) -> int:
        """The character up to which no stop can begin any more, or all there is where stops are shown anyway."""
        end = self._released + len(self._held)
        if self._include:
            return end
        safe = end
        if self._chars is not None:
            safe -= self._chars.depth[self._char_state]
        if self._ids is not None and (depth := self._ids.depth[self._id_state]):
            safe = min(safe, self._starts[-depth])
        return safe

    def _release(self, end: int) -> str:
        """What was still held of the characters before `end`."""
        text, self._held = self._held[: end - self._released], self._held[end - self._released :]
        self._released += len(text)
        return text

    def flush(self) -> str:
        """At the end of a generation that no stop ended: what was held back."""
        return "" if self.stopped else self._release(self._released + len(self._held))
