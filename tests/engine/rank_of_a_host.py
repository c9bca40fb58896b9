"""``python rank_of_a_host.py RANK RANKS ADDRESS PORT COLLECTIVES``: a rank that does nothing but steps: rank 0 sends a
number, all print it. With COLLECTIVES = 1 each step has an all-reduce of gloo over both hosts, in which ranks wait for
each other. Ends with 81 when another rank has ended."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from lightllmd.engine.ranks.host_meeting import HostMeeting, join_host
from lightllmd.engine.ranks.stream import StreamReader, StreamWriter
from lightllmd.errors import EXIT_RANK_GONE

RANK, RANKS, ADDRESS, PORT, COLLECTIVES = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]


def end_with(connections: list[socket.socket]) -> None:
    def watch() -> None:
        select.select(connections, [], [])
        print("gone", flush=True)
        os._exit(EXIT_RANK_GONE)

    threading.Thread(target=watch, daemon=True).start()


def sum_of(store_port: int, own: socket.socket) -> Callable[[int], int]:
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
    store = dist.TCPStore(ADDRESS, store_port, RANKS, is_master=RANK == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=RANKS)

    def reduce(number: int) -> int:
        tensor = torch.tensor([number])
        dist.all_reduce(tensor)
        return int(tensor)

    return reduce


def main() -> None:
    reduce: Callable[[int], int] = lambda number: number * RANKS  # noqa: E731
    if RANK == 0:
        listener = socket.create_server((ADDRESS, PORT))
        steps, life = HostMeeting(listener, 1, RANKS, range(1, RANKS), "").gather(PORT + 1, lambda: None)
        end_with(list(life.values()))
        if COLLECTIVES == "1":
            reduce = sum_of(PORT + 1, steps[1])
        writer = StreamWriter(steps)
        for number in range(1_000_000):
            writer.write(str(number).encode(), lambda: None)
            print(reduce(number) // RANKS, flush=True)
            time.sleep(0.01)
    joined, carried, alive = join_host((ADDRESS, PORT), RANK, RANKS, "", time.sleep)
    end_with([alive])
    if COLLECTIVES == "1":
        reduce = sum_of(joined.store_port, carried)
    reader = StreamReader(carried)
    while True:
        if reader.sleeps():
            select.select([reader.wake], [], [])
        while (body := reader.take()) is not None:
            print(reduce(int(body)) // RANKS, flush=True)
            reader.handled()


main()
