"""Random deaths of engines, against the ledger alone."""

from __future__ import annotations

import random

import pytest

from ledger_bench import Bench
from lightllmd.api.inflight.entry import Entry
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.ipc import messages
from lightllmd.ipc.messages import (
    FINISH_LENGTH,
    FINISH_NONE,
    Abort,
    PromptLogprobs,
    StepOutput,
    Submit,
)


class RandomEngine:
    """A generation as the ledger may meet it: slow, ahead of the ledger, or dead in the middle of a message.

    A prompt's log-probabilities come in parts of any size, and several tokens of a branch in one message.
    """

    def __init__(self, bench: Bench, chance: random.Random) -> None:
        """The newest generation of `bench`."""
        self.bench, self.chance, self.link, self.generation = bench, chance, bench.link, bench.generation
        self.read = 0
        self.rows: dict[tuple[int, int], list] = {}  # (request, branch) -> [submit, position]
        self.untold: dict[int, PromptLogprobs] = {}  # request -> what is still to be said of its prompt

    def turn(self) -> None:
        for message in self.link.sent[self.read :]:
            if isinstance(message, Submit):
                for branch, emitted in zip(message.branches, message.emitted, strict=True):
                    self.rows[message.request, branch] = [message, len(emitted)]
                if message.params.prompt_logprobs >= 0 and not any(message.emitted) and len(message.prompt_ids) > 1:
                    logprobs = prompt_logprobs(message.prompt_ids)
                    self.untold[message.request] = PromptLogprobs(message.request, 1, logprobs, None)
            elif isinstance(message, Abort):
                for key in [key for key in self.rows if key[0] == message.request]:
                    if message.branches is None or key[1] in message.branches:
                        del self.rows[key]
        self.read = len(self.link.sent)
        prompts = [self.told(part) for part in list(self.untold.values()) if self.chance.random() < 0.7]
        ready = [key for key in self.rows if key[0] not in self.untold]
        moved = [key for key in ready for _ in range(self.chance.choice([0, 1, 1, 1, 3]))]
        columns: list[list] = [[], [], [], [], []]
        for key in moved:
            if key not in self.rows:
                continue  # its last token is in this message
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
        if moved or prompts:
            requests, branches, positions, tokens, finishes = columns
            output = StepOutput(self.generation, requests, branches, positions, tokens, [0.0] * len(tokens), finishes)
            output.prompts = prompts
            self.link.inbox.append(messages.decode_to_api(messages.encode(output)))

    def told(self, rest: PromptLogprobs) -> PromptLogprobs:
        """The next part."""
        size = self.chance.randrange(1, 6)
        if size < len(rest.logprobs):
            self.untold[rest.request] = PromptLogprobs(rest.request, rest.first + size, rest.logprobs[size:], None)
        else:
            del self.untold[rest.request]
        return PromptLogprobs(rest.request, rest.first, rest.logprobs[:size], None)


def prompt_logprobs(prompt_ids: list[int]) -> list[float]:
    return [-prompt_ids[at] - at / 8 for at in range(1, len(prompt_ids))]


def turned_away(bench: Bench, entry: Entry, chance: random.Random) -> set[int]:
    """By a full queue, before anything was made of it; perhaps by those of all groups, so that its client hears of
    it."""
    for _ in range(chance.choice([1, 1, 3])):
        group = entry.group
        if group is None or entry.outcome is not None:
            break
        group.link.sent.pop()  # that engine doesn't have it
        group.link.inbox.append(messages.Rejected(group.generation, entry.request, "queue_full", "full", 1.0))
        bench.ledger.receive()
    return {entry.request} if entry.outcome == "failed" else set()


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("seed", range(16))
def test_random_deaths_change_no_byte_of_any_stream(seed, groups):
    """Requests come, go, are turned away and are cancelled while generations die at random, of one group or of several
    that serve side by side; what ends is what would have been."""
    chance = random.Random(seed)
    bench = Bench(cached=seed % 2 == 0)
    engines: dict[int, RandomEngine] = {}
    streams: dict[int, tuple[Entry, int | None]] = {}
    cancelled, refused = set(), set()
    deaths = 0
    for turn in range(3000):
        bench.now += 0.05
        for replica in range(groups):
            act = chance.random()
            if replica not in engines:
                if act < 0.2 / groups:
                    bench.up(replica)
                    engines[replica] = RandomEngine(bench, chance)
            elif act < 0.04 / groups:
                here = [e for e in bench.ledger.entries if e.group is bench.ledger.groups.at(replica)]
                unproven = [e.request for e in here if not e.proven]
                alone = [r for r in unproven if streams[r][0].suspect and streams[r][0].strikes < 2]  # never its third
                generation = engines.pop(replica).generation
                if alone and chance.random() < 0.5:
                    unproven = [chance.choice(alone)]
                    bench.down(*unproven, quarantined=unproven[0], generation=generation)
                else:
                    bench.down(*unproven, generation=generation, outside=chance.random() < 0.3)
                deaths += 1
        if turn < 2000 and chance.random() < 0.05:
            sampled = chance.random() < 0.5
            entry = bench.open(
                bytes(chance.randrange(97, 123) for _ in range(chance.choice([1, 1, 2, 12]))),
                n=chance.choice([1, 1, 2, 4]),
                do_sample=sampled,
                prompt_logprobs=chance.choice([-1, -1, 0]),
                max_new_tokens=chance.randrange(1, 60),
                stop=["e", "zq"] if chance.random() < 0.3 else None,
            )
            streams[entry.request] = (entry, entry.params.seed if sampled else 0)
            if entry.group is not None and chance.random() < 0.1:
                refused |= turned_away(bench, entry, chance)
        for engine in engines.values():
            engine.turn()
        if chance.random() < 0.6:
            bench.ledger.receive()
        bench.ledger.expire()
        if streams and chance.random() < 0.005:
            victim = chance.choice(list(streams.values()))[0]
            if victim.outcome is None:
                bench.ledger.cancel(victim)
                cancelled.add(victim.request)
    for replica in range(groups):
        if replica not in engines:
            bench.up(replica)
            engines[replica] = RandomEngine(bench, chance)
    for _ in range(400):
        for engine in engines.values():
            engine.turn()
        bench.ledger.receive()
    assert deaths > 5
    assert len(streams) > 50
    for entry, seed_used in streams.values():
        if entry.request in cancelled | refused:
            continue
        assert entry.outcome == "ok"
        told = prompt_logprobs(entry.prompt_ids) if entry.params.prompt_logprobs >= 0 else []
        assert entry.prompt_log.logprobs == told
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
    stats = bench.stats
    assert stats["in_flight"] == 0
    assert stats["ok"] + stats["cancelled"] + stats["failed"] == len(streams)
    assert stats["failed"] == len(refused)
    assert all(group.busy == 0 and group.suspects == 0 for group in bench.ledger.groups)
    assert len(bench.ended) == len(streams)
