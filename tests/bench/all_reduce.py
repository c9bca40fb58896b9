"""The collectives of several GPUs of one host: their times by size beside NCCL's, and whether they are right.

``python tests/bench/all_reduce.py [--ranks 2] [--check] [--kill] [--sizes 8K,256K,…] [--calls 64]``

* *times*: sums with a residual, bf16, in place, in CUDA graphs of `--calls` of them: microseconds of one call, the
  median of the slowest rank's over `--replays`. *one*, *one pdl* (overlapping with the call before), *two*, *nccl*
  (with the addition of the residual behind it), *group* (what a model gets, by the limits in force). Then the limits
  that these times speak for. *gather*: fp32 logits of so many rows of a vocabulary of 128256.
* *--check*: against fp64, for each way, size and dtype, the same bits on all ranks; then 1000 replays of a graph of all
  kinds of calls whose inputs change each time, ranks held up at random on the device and on the host.
* *--kill*: rank 1 is killed while rank 0 waits for it in a kernel: seconds until rank 0 is gone when it is killed, too.

``--device cpu`` runs the same in Triton's interpreter with gloo, for the script's own sake: give small sizes.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

KIB, MIB = 1 << 10, 1 << 20
SIZES = [KIB << step for step in range(17)]  # 1 KiB … 64 MiB
WAYS = ("one", "one pdl", "two", "nccl", "group")
HIDDEN, VOCAB = 4096, 128256
GATHERED = (1, 8, 32, 128, 256)  # rows
GOAL = (8 * KIB, 4.0)  # bytes, microseconds


def size_of(text: str) -> int:
    units = {"K": KIB, "M": MIB}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--sizes", type=lambda text: [size_of(part) for part in text.split(",")], default=SIZES)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--calls", type=int, default=64, help="in a graph")
    parser.add_argument("--replays", type=int, default=20, help="timed")
    parser.add_argument("--checked", type=int, default=1000, help="replays of --check")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--no-times", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # of a process that the first one starts
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the first process ------------------------------------------------------------------------------------------------


def start(given: argparse.Namespace, memory: str) -> list[subprocess.Popen[str]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = dict(os.environ)
    if given.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, *sys.argv, "--port", str(port), "--memory", memory]
    return [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(given.ranks)
    ]


def main() -> None:
    given = arguments()
    if given.rank is not None:
        Rank(given).run()
        return
    with tempfile.TemporaryDirectory() as folder:
        processes = start(given, f"{folder}/memory")
        leader = processes[0].stdout
        assert leader is not None
        try:
            killed = None
            for line in leader:
                print(line, end="", flush=True)
                if line.startswith("WAITING"):
                    killed = kill(processes)
                    break
            codes = [process.wait(30) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if killed is not None:
        print(f"RESULT {json.dumps({'work': 'kill', 'seconds_until_gone': round(killed, 3)})}", flush=True)
    elif any(codes):
        raise SystemExit(f"ranks ended with {codes}")


def kill(processes: list[subprocess.Popen[str]]) -> float:
    """The last rank, then the others, one of which waits for it in a kernel. Returns seconds that these took."""
    processes[-1].kill()
    processes[-1].wait()
    time.sleep(1)
    begun = time.monotonic()
    for process in processes[:-1]:
        process.kill()
    for process in processes[:-1]:
        process.wait()
    return time.monotonic() - begun


# --- each rank --------------------------------------------------------------------------------------------------------


class Rank:
    """One process with its device."""

    def __init__(self, given: argparse.Namespace) -> None:
        from lightllmd.kernels import collectives_environment

        collectives_environment.settle()
        import torch
        import torch.distributed as dist

        self.torch, self.dist, self.given, self.rank = torch, dist, given, given.rank
        self.cuda = given.device == "cuda"
        self.device = torch.device("cuda", self.rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        torch.manual_seed(self.rank)
        store = dist.TCPStore("127.0.0.1", given.port, given.ranks, is_master=self.rank == 0, wait_for_workers=False)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.cuda else "gloo",
            store=store,
            rank=self.rank,
            world_size=given.ranks,
            timeout=timedelta(minutes=5),
            device_id=self.device if self.cuda else None,
        )
        assert dist.group.WORLD is not None
        self.processes = dist.group.WORLD
        self.group = self.opened()

    def opened(self) -> Any:
        """A group with room for all sizes in each way that can be had."""
        from lightllmd.architecture import collectives_memory
        from lightllmd.kernels.collectives_device import DeviceGroup

        torch, dist, path = self.torch, self.dist, self.given.memory

        class CpuGroup(DeviceGroup):
            """Its memory is a file's."""

            def _symmetric(self, size: int) -> list[Any]:
                if self.rank == 0:
                    with open(path, "wb") as file:
                        file.truncate(size * self.ranks)
                dist.barrier()
                with open(path, "r+b") as file:
                    shared = torch.frombuffer(mmap.mmap(file.fileno(), size * self.ranks), dtype=torch.uint8)
                return list(shared.view(self.ranks, size))

            def _meet(self) -> None:
                dist.barrier()

        kind = DeviceGroup if self.cuda else CpuGroup
        room = collectives_memory.largest_message(max(self.given.sizes), 1, VOCAB if self.cuda else 256, 1)
        standing = collectives_memory.limits_of(self.given.ranks, room)
        widest = collectives_memory.MessageLimits(min(4 * MIB, max(self.given.sizes)), min(32 * MIB, room))
        widest = collectives_memory.MessageLimits(
            max(widest.one_shot, standing.one_shot), max(widest.two_shot, standing.two_shot)
        )
        group = kind(self.processes, self.device, room, limits=widest)
        self.widest, group._limits = widest, standing
        return group

    def run(self) -> None:
        if self.rank == 0:
            self.tell(
                "start", {"limits": str(self.group._limits), "torch": self.torch.__version__, "card": self.card()}
            )
        if self.given.check:
            self.check()
        if not self.given.no_times:
            self.times()
        if self.given.kill:
            self.wait_for_a_killed_rank()
        self.dist.destroy_process_group()

    def card(self) -> str:
        return self.torch.cuda.get_device_name(self.device) if self.cuda else "cpu"

    def tell(self, work: str, more: dict[str, Any]) -> None:
        print("RESULT", json.dumps({"work": work, "ranks": self.given.ranks, **more}), flush=True)

    # --- ways ---------------------------------------------------------------------------------------------------------
    def way(self, name: str, size: int, dtype: Any) -> Callable[[Any, Any], Any] | None:
        """``residual + sum of x`` in place; None: not of messages of this size."""
        from lightllmd.kernels.collectives_one_shot import one_shot
        from lightllmd.kernels.collectives_two_shot import two_shot

        group = self.group
        if name == "group":
            return group.sum_  # type: ignore[no-any-return]
        if name == "nccl":
            return lambda x, residual: residual.add_(group._summed_by_nccl(x))
        if name == "two":
            if size // dtype.itemsize % 16 or size > self.widest.two_shot:
                return None
            return lambda x, residual: two_shot(x, residual, residual, group._exchange)
        if size > self.widest.one_shot or (name == "one pdl" and not group._overlaps):
            return None
        return lambda x, residual: one_shot(x, residual, residual, group._mail, pdl=name == "one pdl")

    def averaged(self, x: Any, residual: Any) -> Any:
        self.dist.all_reduce(x, op=self.dist.ReduceOp.AVG if self.cuda else self.dist.ReduceOp.MAX)
        return residual.add_(x)

    def captured(self, work: Callable[[], Any]) -> Callable[[], Any]:
        """As a CUDA graph; itself on a CPU."""
        work()
        if not self.cuda:
            return work
        self.meet()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def meet(self) -> None:
        if self.cuda:
            self.torch.cuda.synchronize()
        self.dist.barrier()

    def random(self, size: int, dtype: Any, seed: int) -> Any:
        """Rows of HIDDEN where the size is a multiple of them."""
        source = self.torch.Generator().manual_seed(seed)
        count = max(1, size // dtype.itemsize)
        rows = count // HIDDEN if count % HIDDEN == 0 else 1
        return self.torch.randn(rows, count // rows, generator=source).to(dtype).to(self.device)

    # --- times --------------------------------------------------------------------------------------------------------
    def times(self) -> None:
        dtype = self.torch.bfloat16 if self.cuda else self.torch.float32
        best: dict[str, int] = {}  # the largest size that a way is the fastest at
        lines = [f"{'bytes':>10}" + "".join(f"{name:>10}" for name in self.given.ways) + "  us"]
        for size in self.given.sizes:
            found = {}
            for name in self.given.ways:
                way = self.way(name, size, dtype)
                if way is not None:
                    # In place, where sums of sums would grow beyond all numbers.
                    found[name] = self.microseconds(self.averaged if name == "nccl" else way, size, dtype)
            if self.rank:
                continue
            self.tell("sum", {"bytes": size, "us": {name: round(value, 2) for name, value in found.items()}})
            shown = "".join(f"{found[name]:>10.2f}" if name in found else f"{'':>10}" for name in self.given.ways)
            lines.append(f"{size:>10}{shown}")
            ours = {name.removesuffix(" pdl"): value for name, value in found.items() if name != "group"}
            if ours:
                best[min(ours, key=ours.__getitem__)] = size
            if size == GOAL[0]:
                fastest = min(found.values())
                lines.append(f"{'':>10}  goal {GOAL[1]} us: {'reached' if fastest <= GOAL[1] else 'MISSED'}")
        gathered = [(rows, self.gather_time(rows)) for rows in (GATHERED if self.cuda else (2,))]
        if self.rank == 0:
            for rows, taken in gathered:
                self.tell("gather", {"rows": rows, "us": round(taken, 2)})
            print("\n".join([*lines, f"the largest size that each is the fastest at: {best}"]), flush=True)

    def microseconds(self, call: Callable[[Any, Any], Any], size: int, dtype: Any) -> float:
        """Of one call in a graph of many; the residual is overwritten with what does not grow."""
        x, residual = (self.random(size, dtype, 7 * self.rank + at).mul_(0.001) for at in range(2))
        calls = self.given.calls if size < 4 * MIB else max(4, self.given.calls // 8)

        def work() -> None:
            for _ in range(calls):
                call(x, residual)

        return self.slowest(self.captured(work)) / calls

    def slowest(self, replay: Callable[[], Any]) -> float:
        """Microseconds of a replay: the median over many of what the slowest rank took."""
        torch, taken = self.torch, []
        for _ in range(self.given.replays):
            self.meet()
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                replay()
                end.record()
                torch.cuda.synchronize()
                taken.append(1e3 * begin.elapsed_time(end))
            else:
                begun = time.perf_counter()
                replay()
                taken.append(1e6 * (time.perf_counter() - begun))
        mine = torch.tensor(taken, dtype=torch.float64)
        self.dist.all_reduce(mine, op=self.dist.ReduceOp.MAX)
        return statistics.median(mine.tolist())

    def gather_time(self, rows: int) -> float:
        vocab = VOCAB if self.cuda else 256
        part = self.torch.randn(rows, -(-vocab // self.given.ranks), device=self.device)
        return self.slowest(self.captured(lambda: self.group.gather_columns(part, vocab)))

    # --- check --------------------------------------------------------------------------------------------------------
    def check(self) -> None:
        torch, worst = self.torch, {}
        dtypes = [torch.bfloat16, torch.float16, torch.float32] if self.cuda else [torch.float32, torch.float16]
        for dtype in dtypes:
            for size in [*self.given.sizes, 36, 4 * KIB + 96]:
                everything = [self.random(size, dtype, 100 + rank) for rank in range(self.given.ranks)]
                residual = self.random(size, dtype, 99)
                exact = sum(part.double() for part in everything) + residual.double()
                for name in self.given.ways:
                    way = self.way(name, size, dtype)
                    if way is None:
                        continue
                    out = residual.clone()
                    way(everything[self.rank].clone(), out)
                    error = float((out.double() - exact).norm() / exact.norm())
                    bound = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
                    if not error < bound:
                        raise SystemExit(f"{name}, {size} bytes of {dtype}: relative error {error} on rank {self.rank}")
                    self.same_everywhere(out, f"{name}, {size} bytes of {dtype}")
                    worst[name] = max(worst.get(name, 0.0), error)
        self.check_others()
        self.replays()
        if self.rank == 0:
            self.tell("check", {"worst_relative_error": worst, "replays": self.given.checked, "ok": True})

    def same_everywhere(self, out: Any, what: str) -> None:
        mine = out.contiguous().view(-1).view(self.torch.uint8).cpu()
        first = mine.clone()
        self.dist.broadcast(first, 0)
        if not self.torch.equal(mine, first):
            raise SystemExit(f"{what}: rank {self.rank} has other bits than rank 0")

    def check_others(self) -> None:
        torch = self.torch
        for rows in (1, 3, 130) if self.cuda else (1, 3):
            vocab = VOCAB - 5 if self.cuda else 251
            width = -(-vocab // self.given.ranks)
            parts = [
                self.random(4 * rows * width, torch.float32, 50 + r).view(rows, width) for r in range(self.given.ranks)
            ]
            assert torch.equal(self.group.gather_columns(parts[self.rank], vocab), torch.cat(parts, 1)[:, :vocab])
            scales = [self.random(4 * rows, torch.float32, 70 + rank).abs() for rank in range(self.given.ranks)]
            assert torch.equal(self.group.max_(scales[self.rank].clone()), torch.stack(scales).amax(0))
            total = self.group.sum_small(scales[self.rank])
            assert torch.allclose(total, sum(scales), rtol=1e-6)
            self.same_everywhere(total, "sum_small")

    def replays(self) -> None:
        """Two graphs and eager calls in turns; the inputs are made of a number that each replay adds one to, and wrong
        results are counted on the device."""
        torch, ranks = self.torch, self.given.ranks
        number = torch.zeros((), dtype=torch.int64, device=self.device)
        wrong = torch.zeros((), dtype=torch.int64, device=self.device)
        dtype = torch.bfloat16 if self.cuda else torch.float32
        counts = [4096, 64, 300_000, 3_000_000] if self.cuda else [64, 600]
        places = [torch.arange(count, device=self.device).view(1, -1) for count in counts]

        def inputs(place: Any, rank: int) -> Any:
            return ((place + number * (rank + 1)) % 61).to(dtype)  # whole numbers: their sums are exact

        def work(chosen: list[Any]) -> None:
            number.add_(1)
            for place in chosen:
                wanted = sum(inputs(place, rank).float() for rank in range(ranks)) + (place % 7).float()
                got = self.group.sum_(inputs(place, self.rank), (place % 7).to(dtype))
                wrong.add_((got.float() != wanted.to(dtype).float()).sum())
                most = self.group.max_(inputs(place[:, :32], self.rank).float())
                wrong.add_((most != sum_max([inputs(place[:, :32], rank).float() for rank in range(ranks)])).sum())
            part = inputs(places[0][:, :40], self.rank).float()
            whole = self.group.gather_columns(part, 40 * ranks - 1)
            wanted = torch.cat([inputs(places[0][:, :40], rank).float() for rank in range(ranks)], 1)
            wrong.add_((whole != wanted[:, :-1]).sum())

        def sum_max(parts: list[Any]) -> Any:
            return torch.stack(parts).amax(0)

        steps = [self.captured(lambda: work(places)), self.captured(lambda: work(places[:2])), lambda: work(places)]
        delays, order = random.Random(self.rank), random.Random(0)
        for _ in range(self.given.checked):
            if self.cuda and delays.random() < 0.2:
                torch.cuda._sleep(int(delays.random() * 2e6))  # cycles: up to a millisecond
            if delays.random() < 0.02:
                time.sleep(0.005)
            order.choice(steps)()
        self.meet()
        if int(wrong):
            raise SystemExit(f"rank {self.rank}: {int(wrong)} numbers of {self.given.checked} replays are wrong")

    # --- kill ---------------------------------------------------------------------------------------------------------
    def wait_for_a_killed_rank(self) -> None:
        x = self.random(8 * KIB, self.torch.float32, 0)
        self.meet()
        if self.rank == self.given.ranks - 1:
            time.sleep(60)  # it is killed meanwhile
        if self.rank == 0:
            print("WAITING", flush=True)
        self.group.sum_(x)
        self.meet()


if __name__ == "__main__":
    main()
