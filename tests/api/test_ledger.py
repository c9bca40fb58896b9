"""The ledger keeps every request whole over any sequence of engine deaths. No sockets here, only its logic."""

from __future__ import annotations

import pytest

from ledger_bench import TOKENIZER, Bench
from lightllmd.api.inflight.ledger import Ledger
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
from lightllmd.requests.branch import Branch


def test_request_goes_to_the_engine_and_comes_back_whole():
    bench = Bench()
    bench.up()
    entry = bench.open()
    (submit,) = bench.link.submits
    assert (submit.request, submit.prompt_ids, submit.replay, submit.suspect) == (entry.request, [112], False, 0)
    bench.say((entry, 0, 0, 72, FINISH_NONE))
    bench.say((entry, 0, 1, 105, FINISH_LENGTH))
    assert entry.outcome == "ok"
    assert (entry.branches[0].text, entry.branches[0].finish) == ("Hi", "length")
    assert bench.ended == [entry]
    assert bench.stats == {"in_flight": 0, "held": 0, "ok": 1, "cancelled": 0, "failed": 0, "resumed": 0}


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
    assert bench.stats["held"] == 3
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
    assert bench.stats["resumed"] == 2


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
    bench.ledger.engine_down(7, [], 0)
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
        idle.request: 1,
        busy.request: 0,
        queued.request: 0,
    }
    bench.say((idle, 0, 0, 65, FINISH_NONE))
    bench.down(idle.request)
    bench.up()
    assert not any(s.suspect for s in bench.link.submits)


def test_three_deaths_of_engines_that_ran_it_alone_give_a_request_up_and_no_other():
    bench = Bench()
    bench.up()
    bad, good = bench.open(b"bad"), bench.open(b"good")
    bench.down(bad.request, good.request)
    for deaths in (1, 2, 3):
        assert {s.request: s.suspect for s in bench.up().submits} == {bad.request: deaths, good.request: 1}
        assert bad.outcome is None
        bench.down(bad.request, quarantined=bad.request)
    assert isinstance(bad.error, RequestFailed)
    assert good.outcome is None
    assert [s.request for s in bench.up().submits] == [good.request]
    assert bench.stats["failed"] == 1


def test_deaths_without_evidence_never_give_a_request_up():
    """In a crowd, from outside, or for causes that nothing is known of."""
    bench = Bench()
    bench.up()
    entry, other = bench.open(), bench.open()
    for _ in range(2):
        bench.down(entry.request, quarantined=entry.request)
        bench.up()
    for _ in range(50):
        bench.down(entry.request, other.request)
        bench.up()
    assert entry.outcome is other.outcome is None


@pytest.mark.parametrize("outside", [True, False])
def test_strikes_are_void_once_an_engine_dies_of_something_else(outside):
    """Of a kill, or with no request in it that had no token."""
    bench = Bench()
    bench.up()
    entry = bench.open()
    for _ in range(5):
        for _ in range(2):
            bench.down(entry.request, quarantined=entry.request)
            bench.up()
        bench.down(*[entry.request] * outside, outside=outside)
        bench.up()
    assert (entry.outcome, entry.strikes) == (None, 0)


def test_two_poison_requests_are_both_given_up():
    bench = Bench()
    bench.up()
    bad = [bench.open(), bench.open()]
    bench.down(*(entry.request for entry in bad))
    for turn in range(6):
        bench.up()
        struck = bad[turn % 2]
        bench.down(struck.request, quarantined=struck.request)
    assert all(isinstance(entry.error, RequestFailed) for entry in bad)


def test_a_request_that_keeps_engines_from_the_others_without_evidence_ends_by_its_deadline():
    bench = Bench(hold_timeout=10.0)
    bench.up()
    entry, other = bench.open(), bench.open()
    for death in range(11):
        assert entry.outcome is None
        bench.now = float(death)
        bench.down(entry.request)
        bench.up()
    assert isinstance(entry.error, DeadlineExceeded)
    assert "died 11 times" in entry.error.message
    assert other.outcome is None


def test_token_clears_a_suspect_and_its_strikes():
    bench = Bench()
    bench.up()
    entry = bench.open()
    for _ in range(3):
        for _ in range(3):  # a crowd, two strikes
            bench.down(entry.request, quarantined=entry.request if entry.suspect else 0)
            bench.up()
        bench.say((entry, 0, len(entry.branches[0].ids), 65, FINISH_NONE))
        assert (entry.suspect, entry.strikes) == (0, 0)
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


def test_a_batch_is_held_whole_and_named_as_one_to_every_engine():
    bench = Bench(max_held=1)
    first = bench.open()
    bench.ledger.open([1], SamplingParams(), first.branches, lambda: None, batch=first.request)
    with pytest.raises(QueueFull):
        bench.open()
    for _ in range(2):
        assert [submit.batch for submit in bench.up().submits] == [first.request] * 2
        bench.down()


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
    assert bench.stats["in_flight"] == 0


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


def test_messages_survive_the_wire():
    submit = Submit(1, 0, 1, 5, [1], SamplingParams(exponential_decay_length_penalty=(3, 1.5)), [0], [[]])
    assert messages.decode_to_engine(messages.encode(submit)) == submit


# --- revisions ------------------------------------------------------------------------------------------------------


def successor_of(bench: Bench) -> Ledger:
    return Ledger(bench.tally, **bench.options)


@pytest.mark.parametrize("up_first", [False, True])
def test_successor_replays_what_was_in_flight_in_arrival_order_under_the_same_numbers(up_first):
    bench = Bench()
    bench.up()
    first = bench.open(b"1")
    bench.say((first, 0, 0, 65, FINISH_NONE))
    bench.down()
    never_sent = bench.open(b"2")
    successor = successor_of(bench)
    if up_first:
        successor.engine_up(2, "engine-2")
    bench.ledger.migrate(successor)
    assert (bench.ledger.in_flight, successor.in_flight, successor.held) == (0, 2, 0 if up_first else 2)
    if not up_first:
        successor.engine_up(2, "engine-2")
    assert [(s.request, s.replay, s.emitted) for s in bench.link.submits] == [
        (first.request, True, [[65]]),
        (never_sent.request, False, [[]]),
    ]
    assert bench.tally.counts["resumed"] == 1
    bench.link.inbox.append(StepOutput(2, [first.request], [0], [1], [66], [0.0], [FINISH_LENGTH]))
    successor.receive()
    assert (first.outcome, first.branches[0].ids) == ("ok", [65, 66])
    never_sent.ledger.cancel(never_sent)
    assert bench.link.aborts == [Abort(never_sent.request)]


def test_two_ledgers_of_a_worker_never_give_the_same_number():
    bench = Bench()
    bench.up()
    successor = successor_of(bench)
    other = successor.open([1], SamplingParams(), [Branch(0, TOKENIZER.detokenizer(), None)], lambda: None)
    assert bench.open().request > other.request


def test_link_is_closed_before_the_successor_gets_anything():
    bench = Bench()
    bench.up()
    entry = bench.open()
    bench.link.inbox.append(StepOutput(1, [entry.request], [0], [0], [65], [0.0], [FINISH_NONE]))
    bench.ledger.migrate(successor_of(bench))
    assert bench.link.closed
    bench.ledger.receive()
    assert entry.branches[0].ids == []


def test_held_too_long_counts_over_both_ledgers():
    bench = Bench(hold_timeout=10.0)
    entry = bench.open()
    bench.now = 6.0
    successor = successor_of(bench)
    bench.ledger.migrate(successor)
    bench.now = 9.9
    successor.expire()
    assert entry.outcome is None
    bench.now = 10.0
    successor.expire()
    assert isinstance(entry.error, DeadlineExceeded)


def test_abandoned_ledger_ends_what_it_has_and_takes_nothing():
    bench = Bench()
    bench.up()
    done, begun, silent = bench.open(n=2), bench.open(), bench.open()
    bench.say((done, 0, 0, 65, FINISH_LENGTH), (begun, 0, 0, 65, FINISH_NONE))
    bench.ledger.abandon("it is replaced")
    assert [branch.finish for branch in done.branches] == ["length", "abort"]
    assert (begun.branches[0].finish, silent.branches[0].finish) == ("abort", "abort")
    assert [str(entry.error) for entry in bench.ended] == ["it is replaced"] * 3
    assert len(bench.link.aborts) == 3
    assert bench.link.closed
    with pytest.raises(NotReady, match="it is replaced"):
        bench.open()
    assert bench.tally.counts["failed"] == 3


def test_private_request_is_never_held_and_never_counted():
    bench = Bench()
    branches = [Branch(0, TOKENIZER.detokenizer(), None)]
    with pytest.raises(NotReady):
        bench.ledger.open([0], SamplingParams(), branches, lambda: None, private=True)
    bench.up()
    bench.ledger.refuse("draining")
    entry = bench.ledger.open([0], SamplingParams(), branches, lambda: None, private=True)
    assert bench.ledger.in_flight == 1
    bench.down()
    assert isinstance(entry.error, NotReady)
    assert bench.ended == []
    assert bench.stats == {"in_flight": 0, "held": 0, "ok": 0, "cancelled": 0, "failed": 0, "resumed": 0}


def test_what_can_t_be_sent_is_not_in_flight(monkeypatch):
    bench = Bench()
    bench.up()

    def refuse(message: messages.ToEngine) -> None:
        raise OverflowError("an integer of 80 bits")

    monkeypatch.setattr(bench.link, "send", refuse)
    with pytest.raises(OverflowError):
        bench.open()
    assert bench.ledger.in_flight == 0
