"""The ledger keeps every request whole over any sequence of engine deaths. No sockets here, only its logic."""

from __future__ import annotations

import random

import pytest

from lightllmd.api.branch import Branch
from lightllmd.api.ledger import Entry, Ledger
from lightllmd.engine.fake import fake_token
from lightllmd.errors import DeadlineExceeded, InvalidRequest, NotReady, QueueFull, RequestFailed
from lightllmd.ipc import messages
from lightllmd.ipc.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_NONE,
    Abort,
    Load,
    Rejected,
    SamplingParams,
    StepOutput,
    Submit,
)
from lightllmd.text import ByteTokenizer, StopMatcher

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
        self.ledger = Ledger(0, 1, connect=self._connect, on_end=self.ended.append, clock=lambda: self.now, **options)
        self.generation = 0

    def _connect(self, endpoint: str) -> FakeLink:
        self.links.append(FakeLink())
        return self.links[-1]

    @property
    def link(self) -> FakeLink:
        return self.links[-1]

    def up(self) -> FakeLink:
        self.generation += 1
        self.ledger.engine_up(self.generation, f"engine-{self.generation}")
        return self.link

    def down(self, *unproven: int, self_inflicted: bool = True) -> None:
        self.ledger.engine_down(self.generation, list(unproven), self_inflicted)

    def open(self, prompt: bytes = b"p", n: int = 1, stop: list[str] | None = None, notify=lambda: None, **params):
        params = SamplingParams(n=n, **({"max_new_tokens": 8} | params))
        branches = [
            Branch(index, TOKENIZER.detokenizer(), StopMatcher(stop, [], True) if stop else None) for index in range(n)
        ]
        return self.ledger.open(list(prompt), params, branches, notify)

    def say(self, *rows: tuple[Entry, int, int, int, int], generation: int | None = None) -> None:
        """Rows of (entry, branch, position, token, finish)."""
        requests, branches, positions, tokens, finishes = (list(c) for c in zip(*rows, strict=True))
        self.link.inbox.append(
            StepOutput(
                self.generation if generation is None else generation,
                [entry.request for entry in requests],
                branches,
                positions,
                tokens,
                [-1.0] * len(tokens),
                finishes,
            )
        )
        self.ledger.receive()


def test_request_goes_to_the_engine_with_a_drawn_seed_and_comes_back_whole():
    bench = Bench()
    bench.up()
    entry = bench.open()
    (submit,) = bench.link.submits
    assert (submit.request, submit.prompt_ids, submit.replay, submit.suspect) == (entry.request, [112], False, False)
    assert submit.params.seed > 0
    bench.say((entry, 0, 0, 72, FINISH_NONE))
    bench.say((entry, 0, 1, 105, FINISH_LENGTH))
    assert entry.outcome == "ok"
    assert (entry.branches[0].text, entry.branches[0].finish) == ("Hi", "length")
    assert bench.ended == [entry]
    assert bench.ledger.stats() == {"in_flight": 0, "held": 0, "ok": 1, "cancelled": 0, "failed": 0, "resumed": 0}


def test_seed_of_the_client_is_kept():
    bench = Bench()
    bench.up()
    bench.ledger.open([1], SamplingParams(), [Branch(0, TOKENIZER.detokenizer(), None)], lambda: None, seed=0)
    assert bench.link.submits[0].params.seed == 0


def test_only_the_next_position_is_accepted():
    bench = Bench()
    bench.up()
    entry = bench.open()
    bench.say((entry, 0, 0, 65, FINISH_NONE))
    bench.say((entry, 0, 0, 67, FINISH_NONE))  # again
    bench.say((entry, 0, 1, 68, FINISH_NONE), generation=99)  # another generation's
    assert entry.branches[0].ids == [65]
    bench.say((entry, 0, 2, 66, FINISH_NONE))  # a gap: what is missing can't come any more
    assert isinstance(entry.error, RequestFailed)


def test_replay_has_prompt_and_emitted_apart_in_arrival_order_then_what_is_new():
    bench = Bench()
    bench.up()
    first, second = bench.open(b"1"), bench.open(b"2", n=2)
    bench.say((second, 0, 0, 65, FINISH_LENGTH), (second, 1, 0, 66, FINISH_NONE), (first, 0, 0, 67, FINISH_NONE))
    bench.down()
    assert bench.link.closed
    new = bench.open(b"3")
    assert bench.ledger.stats()["held"] == 3
    replayed = bench.up().submits
    assert [(s.request, s.replay) for s in replayed] == [
        (first.request, True),
        (second.request, True),
        (new.request, False),
    ]
    assert (replayed[0].prompt_ids, replayed[0].emitted) == ([49], [[67]])
    assert (replayed[1].branches, replayed[1].emitted) == ([1], [[66]])  # branch 0 is finished
    assert replayed[1].params == bench.links[0].submits[1].params
    assert [s.arrival_ns for s in replayed] == sorted(s.arrival_ns for s in replayed)
    assert bench.ledger.stats()["resumed"] == 2


def test_socket_of_the_dead_is_closed_before_anything_is_read_from_it():
    bench = Bench()
    bench.up()
    entry = bench.open()
    late = StepOutput(1, [entry.request], [0], [0], [65], [0.0], [FINISH_NONE])
    bench.link.inbox.append(late)
    bench.down(entry.request)
    bench.ledger.receive()
    assert entry.branches[0].ids == []
    assert bench.link.inbox == [late]


def test_death_of_another_generation_changes_nothing():
    bench = Bench()
    bench.up()
    bench.open()
    bench.ledger.engine_down(7, [], True)
    assert bench.ledger.connected


def test_new_generation_takes_over_from_a_live_one_by_replay():
    bench = Bench()
    bench.up()
    entry = bench.open()
    bench.say((entry, 0, 0, 65, FINISH_NONE))
    bench.up()
    assert bench.links[0].closed
    assert [(s.replay, s.emitted) for s in bench.link.submits] == [(True, [[65]])]


def test_suspect_is_who_was_unproven_and_a_token_clears_it():
    bench = Bench()
    bench.up()
    idle, busy, queued = bench.open(b"i"), bench.open(b"b"), bench.open(b"q")
    bench.say((busy, 0, 0, 65, FINISH_NONE))
    bench.down(idle.request, busy.request)  # the flight record may be a step late
    bench.up()
    assert {s.request: s.suspect for s in bench.link.submits} == {
        idle.request: True,
        busy.request: False,
        queued.request: False,
    }
    bench.say((idle, 0, 0, 65, FINISH_NONE))
    bench.down(idle.request)
    bench.up()
    assert not any(s.suspect for s in bench.link.submits)


def test_second_death_of_its_own_making_convicts():
    bench = Bench()
    bench.up()
    bad, good = bench.open(b"bad"), bench.open(b"good")
    bench.down(bad.request, good.request)
    bench.up()
    bench.down(bad.request)  # alone on trial
    assert isinstance(bad.error, RequestFailed)
    assert good.outcome is None
    bench.up()
    assert [s.request for s in bench.link.submits] == [good.request]
    assert bench.ledger.stats()["failed"] == 1


def test_kills_from_outside_take_three_to_convict():
    bench = Bench()
    bench.up()
    entry = bench.open()
    for _ in range(2):
        bench.down(entry.request, self_inflicted=False)
        bench.up()
        assert entry.outcome is None
    bench.down(entry.request, self_inflicted=False)
    assert isinstance(entry.error, RequestFailed)


def test_token_on_trial_resets_the_strikes():
    bench = Bench()
    bench.up()
    entry = bench.open()
    for _ in range(5):
        bench.down(entry.request, self_inflicted=True)
        bench.up()
        bench.say((entry, 0, len(entry.branches[0].ids), 65, FINISH_NONE))
    assert entry.outcome is None


def test_held_too_long_is_a_deadline_and_full_is_429():
    bench = Bench(hold_timeout=10.0, max_held=2)
    notified = []
    first = bench.open(notify=lambda: notified.append(1))
    bench.now = 4.0
    second = bench.open()
    with pytest.raises(QueueFull) as full:
        bench.open()
    assert full.value.retry_after
    bench.now = 10.0
    bench.ledger.expire()
    assert isinstance(first.error, DeadlineExceeded)
    assert notified == [1]
    assert second.outcome is None
    bench.up()
    bench.now = 1000.0
    bench.ledger.expire()
    assert second.outcome is None  # an engine has it
    for _ in range(10):
        bench.open()  # the bound is for those without an engine


def test_stop_text_ends_a_branch_and_drops_what_comes_after():
    bench = Bench()
    bench.up()
    entry = bench.open(n=2, stop=["ab"])
    bench.say((entry, 0, 0, 97, FINISH_NONE), (entry, 1, 0, 120, FINISH_NONE))
    assert not bench.link.aborts
    bench.say((entry, 0, 1, 98, FINISH_NONE), (entry, 1, 1, 120, FINISH_NONE))
    assert bench.link.aborts == [Abort(entry.request, [0])]
    bench.say((entry, 0, 2, 99, FINISH_NONE), (entry, 1, 2, 121, FINISH_LENGTH))
    assert [branch.text for branch in entry.branches] == ["ab", "xxy"]
    assert [len(branch.ids) for branch in entry.branches] == [2, 3]
    assert [branch.finish for branch in entry.branches] == ["stop", "length"]
    assert entry.outcome == "ok"


def test_stop_text_that_a_replay_completes():
    bench = Bench()
    bench.up()
    entry = bench.open(stop=["abc"])
    bench.say((entry, 0, 0, 97, FINISH_NONE))
    bench.say((entry, 0, 1, 98, FINISH_NONE))
    bench.down()
    assert bench.up().submits[0].emitted == [[97, 98]]
    bench.say((entry, 0, 2, 99, FINISH_NONE))
    assert (entry.branches[0].text, entry.branches[0].finish) == ("abc", "stop")


def test_cancelled_request_is_aborted_once_and_forgotten():
    bench = Bench()
    bench.up()
    entry = bench.open()
    bench.ledger.cancel(entry)
    bench.ledger.cancel(entry)
    assert bench.link.aborts == [Abort(entry.request)]
    bench.say((entry, 0, 0, 65, FINISH_NONE))
    assert (entry.outcome, entry.branches[0].ids) == ("cancelled", [])
    assert bench.ledger.stats()["in_flight"] == 0


def test_rejection_is_the_request_s_error():
    bench = Bench()
    bench.up()
    entry, other = bench.open(), bench.open()
    bench.link.inbox += [
        Rejected(1, entry.request, "queue_full", "1024 are waiting", 2.0),
        Rejected(1, other.request, "invalid", "never fits"),
    ]
    bench.ledger.receive()
    assert isinstance(entry.error, QueueFull)
    assert entry.error.retry_after == 2.0
    assert isinstance(other.error, InvalidRequest)


def test_refusing_and_taking_again():
    bench = Bench()
    bench.up()
    kept = bench.open()
    bench.ledger.refuse("draining")
    with pytest.raises(NotReady, match="draining"):
        bench.open()
    bench.say((kept, 0, 0, 65, FINISH_LENGTH))
    assert kept.outcome == "ok"
    bench.ledger.refuse(None)
    bench.open()


def test_end_of_the_server_fails_all():
    bench = Bench()
    entries = [bench.open(), bench.open()]
    bench.ledger.fail_all(NotReady("stopping"))
    assert [entry.outcome for entry in entries] == ["failed", "failed"]


def test_load_is_kept_until_the_engine_is_gone():
    bench = Bench()
    bench.up()
    bench.link.inbox.append(Load(1, 10, 5, 1, 0, 0, 0.5))
    bench.ledger.receive()
    assert bench.ledger.load is not None
    bench.down()
    assert bench.ledger.load is None


def test_engine_s_own_abort_fails_the_request():
    bench = Bench()
    bench.up()
    entry = bench.open()
    bench.say((entry, 0, 0, 0, FINISH_ABORT))
    assert isinstance(entry.error, RequestFailed)


def test_text_that_can_t_be_made_fails_one_request_only():
    bench = Bench()
    bench.up()
    bad, good = bench.open(), bench.open()

    class Broken:
        def push(self, ids):
            raise ValueError("broken")

        def flush(self):
            return ""

    bad.branches[0]._detokenizer = Broken()
    bench.say((bad, 0, 0, 65, FINISH_NONE), (good, 0, 0, 65, FINISH_NONE))
    assert isinstance(bad.error, RequestFailed)
    assert good.branches[0].ids == [65]


def test_reader_is_notified_once_for_many_tokens():
    bench = Bench()
    bench.up()
    notified = []
    entry = bench.open(notify=lambda: notified.append(1))
    bench.link.inbox += [
        StepOutput(1, [entry.request], [0], [position], [65], [0.0], [FINISH_NONE]) for position in range(5)
    ]
    bench.ledger.receive()
    assert notified == [1]
    assert len(entry.branches[0].ids) == 5


class RandomEngine:
    """A generation as the ledger may meet it: slow, ahead of the ledger, or dead in the middle of a message."""

    def __init__(self, bench: Bench, chance: random.Random) -> None:
        self.bench, self.chance, self.link = bench, chance, bench.link
        self.read = 0
        self.rows: dict[tuple[int, int], list] = {}  # (request, branch) -> [submit, position]

    def turn(self) -> None:
        for message in self.link.sent[self.read :]:
            if isinstance(message, Submit):
                for branch, emitted in zip(message.branches, message.emitted, strict=True):
                    self.rows[message.request, branch] = [message, len(emitted)]
            elif isinstance(message, Abort):
                for key in [key for key in self.rows if key[0] == message.request]:
                    if message.branches is None or key[1] in message.branches:
                        del self.rows[key]
        self.read = len(self.link.sent)
        moved = [key for key in self.rows if self.chance.random() < 0.7]
        columns: list[list] = [[], [], [], [], []]
        for key in moved:
            submit, position = self.rows[key]
            token = fake_token(
                submit.prompt_ids, submit.params.seed if submit.params.do_sample else 0, key[1], position
            )
            last = position + 1 == submit.params.max_new_tokens
            row = (*key, position, token, FINISH_LENGTH if last else FINISH_NONE)
            for column, value in zip(columns, row, strict=True):
                column.append(value)
            if last:
                del self.rows[key]
            else:
                self.rows[key][1] += 1
        if moved:
            requests, branches, positions, tokens, finishes = columns
            output = StepOutput(
                self.bench.generation, requests, branches, positions, tokens, [0.0] * len(moved), finishes
            )
            self.link.inbox.append(messages.decode_to_api(messages.encode(output)))


@pytest.mark.parametrize("seed", range(40))
def test_random_deaths_change_no_byte_of_any_stream(seed):
    """Requests come, go and are cancelled while generations die at random; what ends is what would have been."""
    chance = random.Random(seed)
    bench = Bench()
    engine: RandomEngine | None = None
    streams: dict[int, tuple[Entry, int | None]] = {}
    cancelled = set()
    deaths = 0
    for turn in range(3000):
        act = chance.random()
        if engine is None:
            if act < 0.2:
                bench.up()
                engine = RandomEngine(bench, chance)
        elif act < 0.04:
            unproven = [e.request for e in bench.ledger.entries if e.submitted and not e.proven]
            guilty_alone = [r for r in unproven if not streams[r][0].suspect]  # nobody is on trial twice here
            bench.down(*guilty_alone, self_inflicted=chance.random() < 0.5)
            engine, deaths = None, deaths + 1
        if turn < 2000 and chance.random() < 0.05:
            sampled = chance.random() < 0.5
            entry = bench.open(
                bytes([chance.randrange(97, 123)]),
                n=chance.choice([1, 1, 2, 4]),
                do_sample=sampled,
                max_new_tokens=chance.randrange(1, 60),
                stop=["e", "zq"] if chance.random() < 0.3 else None,
            )
            streams[entry.request] = (entry, entry.params.seed if sampled else 0)
        if engine is not None:
            engine.turn()
            if chance.random() < 0.6:
                bench.ledger.receive()
        if streams and chance.random() < 0.005:
            victim = chance.choice(list(streams.values()))[0]
            if victim.outcome is None:
                bench.ledger.cancel(victim)
                cancelled.add(victim.request)
    if engine is None:
        bench.up()
        engine = RandomEngine(bench, chance)
    for _ in range(400):
        engine.turn()
        bench.ledger.receive()
    assert deaths > 5
    assert len(streams) > 50
    for entry, seed_used in streams.values():
        if entry.request in cancelled:
            continue
        assert entry.outcome == "ok"
        for branch in entry.branches:
            whole = bytes(
                fake_token(entry.prompt_ids, seed_used, branch.index, position)
                for position in range(entry.params.max_new_tokens)
            )
            assert bytes(branch.ids) == whole[: len(branch.ids)]
            assert branch.text == whole[: len(branch.ids)].decode()
            if branch.finish == "length":
                assert len(branch.ids) == len(whole)
            else:
                assert branch.text.endswith(("e", "zq"))
    stats = bench.ledger.stats()
    assert stats["in_flight"] == 0
    assert stats["ok"] + stats["cancelled"] == len(streams)
    assert len(bench.ended) == len(streams)


def test_messages_survive_the_wire():
    submit = Submit(1, 0, 1, 5, [1], SamplingParams(exponential_decay_length_penalty=(3, 1.5)), [0], [[]])
    assert messages.decode_to_engine(messages.encode(submit)) == submit
