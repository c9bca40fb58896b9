"""Beam search over sequences: what the search decides becomes their tokens and their pasts.

The beams of a request are a `Fork` from submission to end. The first feeds the prompt; from the first result on, live
beam i is member i, best first, and members beyond have no past.
"""

from __future__ import annotations

import msgspec

from lightllmd.engine.kv_cache.manager import KvCacheManager
from lightllmd.engine.scheduling.beam_search import BeamSearch, HypothesisText
from lightllmd.engine.scheduling.outputs import append_token
from lightllmd.engine.scheduling.sequence import Fork, Sequence
from lightllmd.engine.step import Alternatives, Candidate
from lightllmd.ipc.messages import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, StepOutput

# A beam, the log-probability of its best token, its candidates, and the alternatives that are reported.
BeamResult = tuple[Sequence, float, list[Candidate], Alternatives | None]


def fork(sequences: list[Sequence], eos_ids: frozenset[int], reading: HypothesisText | None = None) -> None:
    """Makes a request's branches the beams of one search. `reading`: where stops end a hypothesis too."""
    params = sequences[0].sampling
    ends = frozenset[int]() if params.ignore_eos and params.grammar is None else eos_ids
    beams = Fork(list(sequences), ends=ends, reading=reading)
    candidates = BeamSearch.candidates(len(sequences), ends, reading is not None)
    params = msgspec.structs.replace(params, do_sample=False, candidates=candidates)
    for sequence in sequences:
        sequence.params, sequence.fork = params, beams
    begin(beams)


def begin(fork: Fork) -> None:
    """A new search, from the prompt on."""
    params = fork.members[0].sampling
    limits = params.max_new_tokens, params.length_penalty
    fork.search = BeamSearch(len(fork.members), fork.ends, *limits, fork.reading)
    for member in fork.members:
        member.emitted = []


def advance(fork: Fork, results: list[BeamResult], keys: KvCacheManager) -> bool:
    """Takes a step's results, one for each live beam; False: the search is over, or can't go on."""
    assert fork.search is not None
    if any(logprob != logprob for _, logprob, _, _ in results):
        return False
    parents = fork.search.advance([one[2] for one in results], [one[3] for one in results])
    if fork.search.done:
        return False
    for member in keys.rearrange(fork.members, parents):
        member.stale = True
    params = fork.members[0].sampling
    counted = params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1
    live = fork.search.live
    for at, member in enumerate(fork.members):
        # One without a past is as long as the others: it needs as many slots once it has one again.
        member.emitted = live[min(at, len(live) - 1)].tokens
        if counted:
            member.stale = True  # the runner counted the token that it drew, not the one that was chosen
    return True


def tell(fork: Fork, results: list[BeamResult], output: StepOutput) -> None:
    """The hypotheses, best first, a branch each. A search over so few tokens that it has fewer repeats the last one."""
    assert fork.search is not None
    lead = fork.members[0]
    if lead.cached:
        output.cached.append((lead.request, lead.cached))
    if not fork.search.done:  # logits that are no numbers
        append_token(output, lead, 0, 0, float("nan"), None, FINISH_ABORT)
        return
    best = fork.search.ended
    for rank, member in enumerate(fork.members):
        hypothesis = best[min(rank, len(best) - 1)]
        last = len(hypothesis.tokens) - 1
        for position, token in enumerate(hypothesis.tokens):
            finish = FINISH_NONE
            if position == last:
                finish = FINISH_STOP if hypothesis.ended else FINISH_LENGTH
            shown = hypothesis.alternatives[position]
            append_token(output, member, position, token, hypothesis.logprobs[position], shown, finish)
