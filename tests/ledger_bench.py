"""A ledger under test, and links that keep what they are given."""

from __future__ import annotations

from lightllmd.api.inflight.entry import Entry
from lightllmd.api.inflight.ledger import Ledger
from lightllmd.api.inflight.tally import Tally
from lightllmd.ipc import messages
from lightllmd.ipc.messages import (
    Abort,
    SamplingParams,
    StepOutput,
    Submit,
)
from lightllmd.requests.branch import Branch
from lightllmd.text import ByteTokenizer, StopList, StopMatcher

TOKENIZER = ByteTokenizer()


class FakeLink:
    """A link whose messages are really encoded, as on the wire."""

    def __init__(self) -> None:
        self.sent: list[messages.ToEngine] = []
        self.inbox: list[messages.ToApi] = []
        self.closed = False

    def send(self, message):
        assert not self.closed
        self.sent.append(messages.decode_to_engine(messages.encode(message)))

    def receive(self):
        assert not self.closed
        inbox, self.inbox = self.inbox, []
        return inbox

    def close(self):
        self.closed = True

    @property
    def submits(self) -> list[Submit]:
        return [message for message in self.sent if isinstance(message, Submit)]

    @property
    def aborts(self) -> list[Abort]:
        return [message for message in self.sent if isinstance(message, Abort)]


class Bench:
    def __init__(self, **options) -> None:
        self.now = 0.0
        self.links: list[FakeLink] = []
        self.ended: list[Entry] = []
        options = {"hold_timeout": 120.0, "max_held": 1000} | options
        self.tally = Tally(0, 1)
        self.options = {"connect": self._connect, "on_end": self.ended.append, "clock": lambda: self.now} | options
        self.ledger = Ledger(self.tally, **self.options)
        self.generation = 0

    def _connect(self, endpoint: str) -> FakeLink:
        self.links.append(FakeLink())
        return self.links[-1]

    @property
    def link(self) -> FakeLink:
        return self.links[-1]

    @property
    def stats(self) -> dict[str, int]:
        return {"in_flight": self.ledger.in_flight, "held": self.ledger.held, **self.tally.counts}

    def up(self, replica: int = 0) -> FakeLink:
        """The next generation, in that place."""
        self.generation += 1
        self.ledger.engine_up(self.generation, f"engine-{self.generation}", replica)
        return self.link

    def down(self, *unproven: int, quarantined: int = 0, outside: bool = False, generation: int | None = None) -> None:
        """The newest, or that one."""
        generation = self.generation if generation is None else generation
        self.ledger.engine_down(generation, list(unproven), quarantined, outside)

    def open(
        self,
        prompt: bytes = b"p",
        n: int = 1,
        stop: list[str] | None = None,
        notify=lambda: None,
        private: bool = False,
        only: int | None = None,
        **params,
    ):
        params = SamplingParams(n=n, **({"max_new_tokens": 8} | params))
        branches = [
            Branch(index, TOKENIZER.detokenizer(), StopMatcher(StopList(stop), True) if stop else None)
            for index in range(n)
        ]
        return self.ledger.open(list(prompt), params, branches, notify, private=private, only=only)

    def say(
        self,
        *rows: tuple[Entry, int, int, int, int],
        generation: int | None = None,
        replica: int | None = None,
    ) -> None:
        """Rows of (entry, branch, position, token, finish). By the group that has the first entry, or that one."""
        group = rows[0][0].group if replica is None else self.ledger.groups.at(replica)
        group = group or next(reversed(list(self.ledger.groups)))
        requests, branches, positions, tokens, finishes = (list(c) for c in zip(*rows, strict=True))
        group.link.inbox.append(
            StepOutput(
                group.generation if generation is None else generation,
                [entry.request for entry in requests],
                branches,
                positions,
                tokens,
                [-1.0] * len(tokens),
                finishes,
            )
        )
        self.ledger.receive()
