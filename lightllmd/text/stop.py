"""Where a generation ends because of what it said: stop texts across token borders, and stop id sequences.

The stop that is complete first ends the sequence; of several that end at the same character the longest. That choice
does not depend on how the text was cut into tokens, so a stream, its replay and a non-streaming answer agree.
Method: Aho & Corasick 1975, "Efficient string matching": time linear in the text, whatever the stops are.

A request's sequences share one `StopList`, which is immutable once its automata are built; what a sequence has of its
own is a `StopMatcher`, a few numbers.
"""

from __future__ import annotations

import copy
from array import array
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cached_property

from lightllmd.errors import InvalidRequest

MAX_STOPS = 64
MAX_STOP_LENGTH = 1024  # characters, or ids
MAX_STOP_TOTAL = 8192  # characters and ids of all stops of a request: 10 ms and 1.5 MB for its automata
_SHIFT = 32  # bits of a symbol in the key of an edge


class _Automaton:
    """Patterns as a trie with failure links. A state's depth is the length of the longest suffix of what was read
    that a pattern begins with; `longest[state]` is the length of the longest pattern that ends there, or 0, and
    `which[state]` that pattern's index."""

    def __init__(self, patterns: Iterable[Sequence[int]]) -> None:
        edges = self._edges = dict[int, int]()  # state << 32 | symbol -> state
        self.depth = array("H", [0])
        self.longest = array("H", [0])
        self.which = array("H", [0])
        parents = array("L", [0])
        for index, pattern in enumerate(patterns):
            state = 0
            for symbol in pattern:
                key = state << _SHIFT | symbol
                following = edges.get(key)
                if following is None:
                    following = edges[key] = len(parents)
                    parents.append(key)
                    self.depth.append(self.depth[state] + 1)
                    self.longest.append(0)
                    self.which.append(0)
                state = following
            self.longest[state], self.which[state] = len(pattern), index
        self._failure = array("L", bytes(8 * len(parents)))
        self._link(parents)

    def _link(self, parents: array[int]) -> None:
        """`parents`: the key of the edge that leads to each state."""
        depth, longest, which, failure = self.depth, self.longest, self.which, self._failure
        # Breadth first: a state's failure link is shallower, hence already known.
        for state in sorted(range(1, len(parents)), key=depth.__getitem__):
            parent, symbol = parents[state] >> _SHIFT, parents[state] & ((1 << _SHIFT) - 1)
            if parent:
                failure[state] = self.step(failure[parent], symbol)
                if not longest[state]:
                    longest[state], which[state] = longest[failure[state]], which[failure[state]]

    def step(self, state: int, symbol: int) -> int:
        edges, failure = self._edges, self._failure
        while (following := edges.get(state << _SHIFT | symbol)) is None:
            if not state:
                return 0
            state = failure[state]
        return following


class StopList:
    """The stops of one request. The automata are built when they are first used, or by `build`, which may run in a
    thread."""

    def __init__(self, strings: Sequence[str] = (), ids: Sequence[Sequence[int]] = ()) -> None:
        """Raises InvalidRequest for an empty stop, one that is too long, too many, or too much in all."""
        if len(strings) + len(ids) > MAX_STOPS:
            raise InvalidRequest(f"{len(strings) + len(ids)} stop sequences, at most {MAX_STOPS}")
        for stop in (*strings, *ids):
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise InvalidRequest(f"a stop sequence has length {len(stop)}, must be 1 to {MAX_STOP_LENGTH}")
        self.strings = list(strings)
        self.ids = list(ids)
        self.size = sum(map(len, self.strings)) + sum(map(len, self.ids))  # characters and ids
        if self.size > MAX_STOP_TOTAL:
            raise InvalidRequest(f"the stop sequences have {self.size} characters or ids, at most {MAX_STOP_TOTAL}")

    def __bool__(self) -> bool:
        return self.size > 0

    @cached_property
    def of_text(self) -> _Automaton | None:
        """Finds the strings, character by character (Aho and Corasick 1975); None: there are none."""
        return _Automaton([*map(ord, stop)] for stop in self.strings) if self.strings else None

    @cached_property
    def of_ids(self) -> _Automaton | None:
        """Finds the id sequences; None: there are none."""
        return _Automaton(self.ids) if self.ids else None

    @cached_property
    def longest_ids(self) -> int:
        """Ids of the longest id sequence, at least 1."""
        return max(map(len, self.ids), default=1)

    def build(self) -> None:
        """Builds both automata now, not at the first token."""
        _ = self.of_text, self.of_ids


class StopMatcher:
    """For one sequence. Push each token's text with its id, one token a call; it returns what may be released.

    With `include_stop` the released text ends with the stop. Without, it ends right before it, and any suffix that may
    yet become a stop is held back. What comes after the stop, in the same token too, is never released.

    A token whose text is not shown (a special one) is still found by a stop that holds the token's whole text: two
    states are kept from such a token on, that of the text that is shown and that of the text with what is not, until
    they are the same again.

    A stop that is complete before the sequence has `min_tokens` tokens is passed over, as an eos is.
    """

    def __init__(self, stops: StopList, include_stop: bool = True, min_tokens: int = 1) -> None:
        self._stops = stops
        self._chars = stops.of_text
        self._ids = stops.of_ids
        self._include = include_stop
        self._min_tokens = min_tokens
        self._may_stop = False  # there are as many tokens now
        self._char_state = 0
        self._full_state: int | None = None  # of the text with what is not shown; None: the same as `_char_state`
        self._unshown: deque[tuple[int, int]] = deque(maxlen=MAX_STOP_LENGTH)
        #   (place, characters) of what is not shown, while the states differ
        self._id_state = 0
        self._held = ""
        self._released = 0  # characters; `_held` begins there
        self._starts: deque[int] = deque(maxlen=stops.longest_ids)
        #   where the text of each of the last tokens begins, in characters from the start
        self.stopped = False
        self.found: str | Sequence[int] | None = None  # the stop that ended it
        self.tokens = 0  # tokens up to and including the one that completed the stop; those after it don't count

    def copy(self) -> StopMatcher:
        """Another one that goes on from here."""
        other = copy.copy(self)
        other._unshown, other._starts = self._unshown.copy(), self._starts.copy()
        return other

    @property
    def held(self) -> str:
        """What is held back now; `flush` would release it."""
        return self._held

    def push(self, text: str, ids: Sequence[int] = (), unshown: str = "") -> str:
        """`text` is what `ids` (one token; none for a detokenizer's last words) added; `unshown`: the token's own text
        where the client does not see it. Returns "" once stopped."""
        if self.stopped:
            return ""
        start = self._released + len(self._held)
        self._held += text
        self.tokens += len(ids)
        self._may_stop = self.tokens >= self._min_tokens
        found = self._find_text(text, start) or self._find_unshown(unshown) or self._find_ids(ids, start)
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
        if self._full_state is not None:
            return self._find_twofold(text, start)
        state, step, longest = self._char_state, self._chars.step, self._chars.longest
        for end, char in enumerate(text, start + 1):
            state = step(state, ord(char))
            if longest[state] and self._may_stop:
                self.found = self._stops.strings[self._chars.which[state]]
                return end - longest[state], end
        self._char_state = state
        return None

    def _find_twofold(self, text: str, start: int) -> tuple[int, int] | None:
        """The same where what was not shown counts too."""
        assert self._chars is not None
        step, longest = self._chars.step, self._chars.longest
        for index, char in enumerate(text):
            if self._full_state is None:
                return self._find_text(text[index:], start + index)
            end = start + index + 1
            self._char_state = step(self._char_state, ord(char))
            full = self._full_state = step(self._full_state, ord(char))
            begins = [(end - longest[self._char_state], self._char_state)]
            if longest[full]:
                begins.append((self._place(longest[full], end), full))
            begin, state = min(begins)
            if begin < end and self._may_stop:
                self.found = self._stops.strings[self._chars.which[state]]
                return begin, end
            if full == self._char_state:
                self._full_state = None
                self._unshown.clear()
        return None

    def _find_unshown(self, text: str) -> tuple[int, int] | None:
        """A stop that ends with the text of a token that is not shown, and holds all of it."""
        if not text or self._chars is None:
            return None
        end = self._released + len(self._held)
        state = self._char_state if self._full_state is None else self._full_state
        for char in text:
            state = self._chars.step(state, ord(char))
        self._unshown.append((end, len(text)))
        if self._chars.longest[state] >= len(text) and self._may_stop:
            self.found = self._stops.strings[self._chars.which[state]]
            return self._place(self._chars.longest[state], end), end
        if self._chars.depth[state] < len(text):
            state = 0  # no stop begins within such a token
        self._full_state = state
        if state == self._char_state:
            self._full_state = None
            self._unshown.clear()
        return None

    def _place(self, length: int, end: int) -> int:
        """The shown character at which the last `length` characters before `end` begin, those not shown counted."""
        for place, hidden in reversed(self._unshown):
            if length <= end - place:
                break
            length -= end - place + hidden
            end = place
            if length <= 0:
                return place
        return end - length

    def _find_ids(self, ids: Sequence[int], start: int) -> tuple[int, int] | None:
        """The stop id sequence that these ids complete, as the characters that its tokens added."""
        if self._ids is None:
            return None
        for number in ids:
            self._starts.append(start)
            self._id_state = self._ids.step(self._id_state, number)
            length = self._ids.longest[self._id_state]
            if length and self._may_stop:
                self.found = self._stops.ids[self._ids.which[self._id_state]]
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
            if self._full_state is not None:
                safe = min(safe, self._place(self._chars.depth[self._full_state], end))
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
