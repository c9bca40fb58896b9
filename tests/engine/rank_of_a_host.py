"""``python rank_of_a_host.py RANK RANKS ADDRESS PORT KIND``: a rank that prints each step's number. KIND engine: the
scheduler, leading runner and following loop with the fake back end; rank 0 prints "token N", too. KIND gloo: each
step is an all-reduce over both hosts, in which ranks wait for each other. Ends with 81 when another rank has ended."""

from __future__ import annotations

import os
import select
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).parents[1]))

from engine_process import fake_plan
from lightllmd.architecture.ranks import Rank
from lightllmd.config.parameters import FakeSettings
from lightllmd.config.plan import Plan
from lightllmd.engine.backends import scheduler_for
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.ranks.following import Follower
from lightllmd.engine.ranks.guard import PeerGuard, end_process
from lightllmd.engine.ranks.host_meeting import HostMeeting, join_host
from lightllmd.engine.ranks.leading import LeadingRunner
from lightllmd.engine.ranks.member import Member
from lightllmd.engine.ranks.stream import StreamReader, StreamWriter
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.step import Step
from lightllmd.ipc import channel, messages

RANK, RANKS, ADDRESS, PORT, KIND = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
STORE = PORT + 1


def nothing(*_: object) -> None:
    pass


class Printing(FakeRunner):
    """Tells of each step."""

    def launch(self, step: Step, *rest: object) -> None:
        print(step.number, flush=True)
        super().launch(step, *rest)


def lead(plan: Plan, guard: PeerGuard, writer: StreamWriter) -> None:
    own = Printing(FakeSettings(), Member(Rank(0, RANKS)))
    runner, scheduler = LeadingRunner(own, writer, guard), scheduler_for(plan, 1)
    loop = StepLoop(scheduler, runner)
    runner.load(plan, nothing)
    runner.prepare(nothing)
    for number, (prompt, tokens) in enumerate([("warm", 2), ("hello", 3000)]):
        params = messages.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        request = messages.Submit(number, 0, 1, 0, list(prompt.encode()), params, branches=[0], emitted=[[]])
        assert scheduler.submit(request) is None
        while loop.busy:
            for output in loop.turn(nothing).values():
                for token in output.tokens if number else ():
                    print("token", token, flush=True)
            time.sleep(0.01)


def sum_of(own: socket.socket) -> Callable[[int], int]:
    """An all-reduce. `own`: any connection to another host, whose interface gloo is to take."""
    import psutil
    import torch
    import torch.distributed as dist

    [interface] = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if own.getsockname()[0] in [address.address for address in addresses]
    ]
    os.environ["GLOO_SOCKET_IFNAME"] = interface
    store = dist.TCPStore(ADDRESS, STORE, RANKS, is_master=RANK == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS)

    def reduce(number: int) -> int:
        tensor = torch.tensor([number])
        dist.all_reduce(tensor)
        return int(tensor)

    return reduce


def lead_sums(reduce: Callable[[int], int], guard: PeerGuard, writer: StreamWriter) -> NoReturn:
    for number in range(1_000_000):
        writer.write(str(number).encode(), guard.check)
        print(reduce(number) // RANKS, flush=True)
        time.sleep(0.01)
    raise AssertionError


def follow_sums(reduce: Callable[[int], int], reader: StreamReader) -> NoReturn:
    while True:
        if reader.sleeps():
            select.select([reader.wake], [], [])
        while (body := reader.take()) is not None:
            print(reduce(int(body)) // RANKS, flush=True)
            reader.handled()


def main() -> None:
    plan = fake_plan({"max_req_input_len": 100, "max_req_total_len": 3500}, 4000, RANKS)
    if RANK == 0:
        listener = socket.create_server((ADDRESS, PORT))
        steps, life = HostMeeting(listener, 1, RANKS, range(1, RANKS), "").gather(STORE, nothing)
        (guard := PeerGuard(life, end_process)).start(terminates=False)
        if KIND == "gloo":
            lead_sums(sum_of(steps[1]), guard, StreamWriter(steps))
        lead(plan, guard, StreamWriter(steps))
        return
    _, carried, alive = join_host((ADDRESS, PORT), RANK, RANKS, "", time.sleep)
    (guard := PeerGuard({0: alive}, end_process)).start(terminates=False)
    if KIND == "gloo":
        follow_sums(sum_of(carried), StreamReader(carried))
    _supervisors, link = channel.pair()
    configure = messages.EngineConfigure(b"", 1, RANK, "", "", "", ranks=RANKS)
    follower = Follower(channel.inherited(link.detach()), configure, plan)
    follower.serve(Printing(FakeSettings(), Member(Rank(RANK, RANKS))), StreamReader(carried), guard)


main()
