"""The ledger over several groups that serve its revision side by side: which one has a request, and who takes over."""

from __future__ import annotations

from ledger_bench import Bench, FakeLink
from lightllmd.api.inflight.ledger import SUSPECT_PATIENCE
from lightllmd.api.inflight.routing import BLOCK
from lightllmd.errors import NotReady, QueueFull
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_NONE, Load, Rejected


class Pair:
    """A ledger with two groups, generations 1 and 2."""

    def __init__(self, **options) -> None:
        self.bench = Bench(**options)
        self.links = [self.bench.up(replica=0), self.bench.up(replica=1)]

    def load(self, replica: int, running: int = 0, waiting: int = 0, queued: int = 0) -> None:
        """That group says so."""
        group = self.bench.ledger.groups.at(replica)
        assert group is not None
        word = Load(group.generation, 10_000, 0, running, waiting, 0, 0.0, queued)
        group.link.inbox.append(word)  # type: ignore[attr-defined]
        self.bench.ledger.receive()

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.links[0].submits), len(self.links[1].submits)

    def of(self, entry) -> FakeLink:
        """The link of the group that has it."""
        return entry.group.link

    def refuse(self, entry, after: float) -> None:
        group = entry.group
        group.link.inbox.append(Rejected(group.generation, entry.request, "queue_full", "full", after))
        self.bench.ledger.receive()


def test_requests_are_shared_out_evenly():
    pair = Pair()
    entries = [pair.bench.open(bytes([n])) for n in range(20)]
    assert abs(pair.counts[0] - pair.counts[1]) <= 2
    assert all(entry.group is not None for entry in entries)


def test_what_other_api_workers_have_there_counts():
    pair = Pair()
    pair.load(0, running=30)
    for n in range(10):
        pair.bench.open(bytes([n]))
    assert pair.counts == (0, 10)
    pair.load(0, running=0)
    pair.load(1, queued=100_000)
    for n in range(10):
        pair.bench.open(bytes([n]))
    assert pair.counts == (10, 10)


def test_prompts_go_where_their_beginning_is_in_the_cache_unless_it_is_far_busier():
    pair = Pair(cached=True)
    prompt = bytes(range(BLOCK)) * 3
    first = pair.bench.open(prompt)
    assert all(pair.bench.open(prompt + bytes([n])).group is first.group for n in range(2))
    pair.load(first.group.replica, running=100)
    assert pair.bench.open(prompt + b"x").group is not first.group


def test_a_prompt_is_forgotten_with_the_generation_that_had_it():
    pair = Pair(cached=True)
    prompt = bytes(range(BLOCK)) * 3
    first = pair.bench.open(prompt)
    pair.bench.ledger.cancel(first)
    replica = pair.bench.ledger.groups.at(0)
    had = 0 if replica.prefixes.match([*replica.prefixes._known]) else 1
    pair.bench.down(generation=had + 1, outside=True)
    pair.bench.up(replica=had)
    assert not pair.bench.ledger.groups.at(had).prefixes


def test_streams_of_a_dead_group_go_on_at_once_on_another_one():
    pair = Pair()
    entries = [pair.bench.open(bytes([n])) for n in range(8)]
    for entry in entries:
        pair.bench.say((entry, 0, 0, 65, FINISH_NONE))
    there, lost = pair.counts[1], [entry for entry in entries if entry.group.replica == 0]
    pair.bench.down(generation=1)
    assert pair.links[0].closed
    moved = pair.links[1].submits[there:]
    assert [(s.request, s.replay, s.emitted) for s in moved] == [(e.request, True, [[65]]) for e in lost]
    assert pair.bench.stats["held"] == 0
    assert pair.bench.stats["resumed"] == len(lost) > 0
    for entry in entries:
        pair.bench.say((entry, 0, 1, 66, FINISH_LENGTH))
    assert all(entry.outcome == "ok" and entry.branches[0].ids == [65, 66] for entry in entries)


def test_all_groups_dead_requests_are_held_and_the_first_that_is_up_has_them_all():
    pair = Pair()
    entries = [pair.bench.open(bytes([n])) for n in range(6)]
    pair.bench.down(generation=1)
    pair.bench.down(generation=2)
    assert pair.bench.stats["held"] == 6
    link = pair.bench.up(replica=1)
    assert [s.request for s in link.submits] == [e.request for e in entries]


def test_a_group_that_comes_up_takes_nothing_from_those_that_serve():
    pair = Pair()
    for n in range(6):
        pair.bench.open(bytes([n]))
    pair.bench.down(generation=1)
    assert pair.bench.up(replica=0).submits == []
    assert pair.bench.open(b"new").group.replica == 0


def test_suspects_wait_for_their_own_group_so_that_the_others_are_not_concerned():
    pair = Pair()
    bad = pair.bench.open(b"bad")
    other = next(e for n in range(9) if (e := pair.bench.open(bytes([n]))).group is not bad.group)
    died, stays = bad.group, other.group
    pair.bench.down(bad.request, generation=died.generation)
    assert bad.group is None
    assert bad.held_since is not None
    assert other.group is stays
    link = pair.bench.up(replica=died.replica)
    assert [(s.request, s.suspect) for s in link.submits] == [(bad.request, 1)]
    assert all(pair.bench.open(bytes([n])).group is stays for n in range(9))  # none goes where a suspect runs
    pair.bench.say((bad, 0, 0, 65, FINISH_NONE))
    pair.load(stays.replica, running=50)
    assert pair.bench.open(b"now").group is bad.group


def test_a_suspect_whose_group_stays_away_goes_to_another_one():
    pair = Pair()
    bad = pair.bench.open(b"bad")
    pair.bench.down(bad.request, generation=bad.group.generation)
    pair.bench.now = SUSPECT_PATIENCE - 0.1
    pair.bench.ledger.expire()
    assert bad.group is None
    pair.bench.now = SUSPECT_PATIENCE
    pair.bench.ledger.expire()
    assert bad.group is not None


def test_nobody_is_a_suspect_of_a_death_from_outside_while_another_group_serves():
    pair = Pair()
    entry = pair.bench.open()
    pair.bench.down(entry.request, generation=entry.group.generation, outside=True)
    assert entry.group is not None
    assert pair.of(entry).submits[-1].suspect == 0


def test_poisoned_request_gets_its_500_and_kills_one_place_alone():
    pair = Pair()
    bad = pair.bench.open(b"bad")
    replica = bad.group.replica
    others = [e for n in range(9) if (e := pair.bench.open(bytes([n]))).group is not bad.group]
    pair.bench.down(bad.request, generation=bad.group.generation)
    for _ in range(3):
        assert bad.outcome is None
        pair.bench.up(replica=replica)
        assert bad.group.replica == replica
        pair.bench.down(bad.request, quarantined=bad.request, generation=bad.group.generation)
    assert bad.error is not None
    assert all(entry.group.replica != replica and entry.outcome is None for entry in others)


def test_full_group_passes_a_request_on_before_its_client_hears_of_that():
    pair = Pair()
    entry = pair.bench.open()
    first = entry.group
    pair.refuse(entry, 2.0)
    assert entry.outcome is None
    assert entry.group is not first
    assert pair.of(entry).submits[-1].replay is False  # the other queue's bound holds, too
    pair.refuse(entry, 1.0)
    assert isinstance(entry.error, QueueFull)
    assert entry.error.retry_after == 1.0
    assert pair.bench.stats["resumed"] == 0


def test_a_request_that_one_group_refused_is_replayed_anywhere():
    pair = Pair()
    entry = pair.bench.open()
    first = entry.group
    pair.refuse(entry, 2.0)
    pair.bench.down(generation=entry.group.generation, outside=True)
    assert entry.group is first
    assert pair.of(entry).submits[-1].replay is True


def test_aborts_go_to_the_group_that_has_the_request():
    pair = Pair()
    entry = pair.bench.open(stop=["B"])
    pair.bench.say((entry, 0, 0, 66, FINISH_NONE))
    other = pair.bench.open()
    link = pair.of(other)
    pair.bench.ledger.cancel(other)
    assert link.aborts[-1].request == other.request
    assert sum(len(link.aborts) for link in pair.links) == 2


def test_what_an_engine_says_of_a_request_that_is_elsewhere_does_not_count():
    pair = Pair()
    entry = pair.bench.open()
    wrong = 1 - entry.group.replica
    pair.bench.say((entry, 0, 0, 65, FINISH_NONE), replica=wrong)
    assert entry.branches[0].ids == []
    pair.bench.say((entry, 0, 0, 66, FINISH_NONE))
    assert entry.branches[0].ids == [66]


def test_a_probe_goes_to_the_group_that_is_asked_about():
    pair = Pair()
    for generation in (1, 2):
        entry = pair.bench.open(private=True, only=generation)
        assert entry.group.generation == generation
    try:
        pair.bench.open(private=True, only=7)
    except NotReady:
        pass
    else:
        raise AssertionError("there is no generation 7")


def test_load_is_that_of_all_groups_together():
    pair = Pair()
    pair.load(0, running=3, queued=7)
    pair.load(1, running=4, waiting=2)
    told = pair.bench.ledger.load
    assert (told.slots_total, told.running, told.waiting, told.queued_tokens) == (20_000, 7, 2, 7)


def test_ended_requests_leave_no_load_behind():
    pair = Pair()
    entries = [pair.bench.open(bytes([n]), n=2) for n in range(6)]
    for entry in entries[:3]:
        pair.bench.say((entry, 0, 0, 65, FINISH_LENGTH), (entry, 1, 0, 65, FINISH_LENGTH))
    for entry in entries[3:]:
        pair.bench.ledger.cancel(entry)
    assert [group.busy for group in pair.bench.ledger.groups] == [0.0, 0.0]
