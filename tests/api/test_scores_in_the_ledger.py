"""The ledger takes a request's vectors once, and asks again for those that an engine died with."""

from __future__ import annotations

from array import array

from ledger_bench import Bench
from lightllmd.api.inflight.entry import Entry
from lightllmd.errors import NotReady, RequestFailed
from lightllmd.ipc.messages import FINISH_NONE, Pooled, PoolingParams, StepOutput


def opened(bench: Bench, prompt: bytes = b"prompt") -> Entry:
    return bench.ledger.open(list(prompt), PoolingParams(), [], lambda: None)


def say(bench: Bench, *results: Pooled, cached: tuple[tuple[int, int], ...] = ()) -> None:
    output = StepOutput(bench.generation, [], [], [], [], [], [], cached=list(cached), pooled=list(results))
    bench.link.inbox.append(output)
    bench.ledger.receive()


def vector(*values: float) -> bytes:
    return array("f", values).tobytes()


def test_the_first_result_ends_it_and_no_second_is_taken() -> None:
    bench = Bench()
    bench.up()
    entry = opened(bench)
    (submit,) = bench.link.submits
    assert (submit.branches, submit.emitted, submit.params) == ([0], [[]], PoolingParams())
    results = [Pooled(entry.request, [vector(value, 2.0)]) for value in (1.5, 7.0)]
    say(bench, *results, cached=((entry.request, 3),))
    say(bench, results[1])
    assert (entry.outcome, entry.values, entry.cached) == ("ok", [[1.5, 2.0]], 3)
    assert entry.first_token_at is not None
    assert bench.ended == [entry]
    assert bench.link.aborts == []


def test_what_has_no_result_yet_is_replayed_as_it_came() -> None:
    bench = Bench()
    bench.up()
    first, second = opened(bench, b"1"), opened(bench, b"2")
    say(bench, Pooled(first.request, [vector(0.5)]))
    bench.down(second.request)
    (again,) = bench.up().submits
    assert (again.request, again.replay, again.suspect, again.emitted) == (second.request, True, 1, [[]])
    assert again.params == PoolingParams()
    say(bench, Pooled(second.request, [vector(0.25)]))
    assert (second.outcome, second.values, second.suspect) == ("ok", [[0.25]], 0)
    assert bench.stats["resumed"] == 1


def test_values_that_are_no_numbers_end_that_request_alone() -> None:
    bench = Bench()
    bench.up()
    bad, good = opened(bench), opened(bench)
    say(bench, Pooled(bad.request, None), Pooled(good.request, [vector(1.0)]))
    assert isinstance(bad.error, RequestFailed)
    assert good.outcome == "ok"


def test_vectors_are_no_answer_to_a_request_for_tokens() -> None:
    bench = Bench()
    bench.up()
    entry = bench.open()
    bench.say((entry, 0, 0, 72, FINISH_NONE))
    say(bench, Pooled(entry.request, [vector(1.0)]))
    assert isinstance(entry.error, RequestFailed)


def test_what_is_cut_has_an_error_for_an_answer() -> None:
    bench = Bench()
    bench.up()
    entry = opened(bench)
    bench.ledger.cut("the model was replaced")
    assert isinstance(entry.error, NotReady)
    assert [abort.request for abort in bench.link.aborts] == [entry.request]
