"""Makes the tables of tiles for the card at hand: ``python tests/bench/tune.py [--shape 8b] [--schemes dense,w4a16]``.

Times candidate tiles of every linear of a model's shape, over rows of x, each result checked, and prints the tables as
the source holds them: `TUNED` of `kernels/tiles.py` (dense) and of `kernels/packed/tiles.py` (w4a16, w8a16). Paste what
it prints under the card's kind. A shape takes about five minutes; ``8b/2`` is what each of two ranks has of one.

``--dry`` is for machines without a card: it compiles the candidates for Hopper and prints registers, spills and
shared memory of each.

A further scheme is an entry of `SCHEMES_OF`: how its candidates, operands and table are made.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parent.parent / "kernels"))

import torch
from cases import packed, products
from cases.products import SHAPES, Product, Variant, products_of
from cases.timing import Deadline, Report, median_us

from lightllmd.architecture.schemes import SCHEMES
from lightllmd.kernels import skinny
from lightllmd.kernels.cards import card_of

COMPILERS = 14  # processes
BARELY = 0.98  # of the derived tile's time: what is no faster than that does not replace it


class Tunable(Protocol):
    """What a scheme's linears need in order to be tuned."""

    table: str  # the source's file of its `TUNED`

    def candidates(self, product: Product, m: int) -> list[Any]:
        """Tiles, that of the rules first; empty where cuBLAS alone is worth a thought."""

    def launches(self, product: Product, m: int, tile: Any) -> list[skinny.Launch]:
        """Of tensors without memory, to be compiled."""

    def times(self, product: Product, m: int, tiles: list[Any], report: Report) -> list[tuple[float, Any]]:
        """Microseconds of each tile that gives the right result, and with None those of cuBLAS."""

    def key(self, product: Product) -> tuple[object, ...]:
        """The product's key in the table."""


class Dense:
    """16-bit weights: `skinny` and `gemv` beside cuBLAS."""

    table = "kernels/tiles.py"

    def candidates(self, product: Product, m: int) -> list[Any]:
        """Those of `kernels.py --sweep`."""
        rule = products.tiles.tile_for(m, product.n, product.k, products.DTYPE, product.gates)
        return list(dict.fromkeys([rule, *products.candidates(product, m)])) if m <= 128 else []

    def launches(self, product: Product, m: int, tile: Any) -> list[skinny.Launch]:
        """As the linear launches it, with its norm inside where the kernel can."""
        operands = products.Operands(
            product, m, torch.empty(product.n * product.k, device="meta", dtype=products.DTYPE), "meta"
        )
        return [operands.launch(self._variant(product, m, tile), operands.weights[0])]

    def times(self, product: Product, m: int, tiles: list[Any], report: Report) -> list[tuple[float, Any]]:
        """With norm and activation, which cuBLAS has in launches of their own."""
        count = products.copies_for(product.size)
        pool = torch.empty(count * product.n * product.k, device="cuda", dtype=products.DTYPE)
        for part in pool.split(1 << 26):
            part.normal_(0, 0.02)
        operands, found = products.Operands(product, m, pool, "cuda"), []
        for tile in tiles:
            with report.case(f"{product.name} {m} {tile}"):
                variant = self._variant(product, m, tile)
                operands.check(variant)
                found.append((median_us(operands.calls(operands.ours(variant, True)), 5), tile))
        return [*found, (median_us(operands.calls(operands.cublas(True)), 5), None)]

    def key(self, product: Product) -> tuple[object, ...]:
        """As `tiles.TUNED` has it."""
        return product.gates, product.n, product.k

    @staticmethod
    def _variant(product: Product, m: int, tile: Any) -> Variant:
        fused = product.normed and tile.gemv and products.tiles.fuses_norm(m, products.DTYPE)
        return Variant(tile, fused, products.tiles.overlaps(m, product.n))


class PackedBits:
    """Weights of 4 or 8 bits: `packed_skinny` and `packed_wide` beside a dense copy for cuBLAS."""

    table = "kernels/packed/tiles.py"

    def __init__(self, name: str) -> None:
        self._scheme, self._bits = SCHEMES[name], packed.BITS[name]

    def candidates(self, product: Product, m: int) -> list[Any]:
        """The head is not quantised."""
        return [] if product.name == "head" else packed.candidates(product, m, self._scheme)

    def launches(self, product: Product, m: int, tile: Any) -> list[skinny.Launch]:
        """As the linear launches it."""
        return packed.Operands.random(product, m, self._scheme, "meta").launches(tile)

    def times(self, product: Product, m: int, tiles: list[Any], report: Report) -> list[tuple[float, Any]]:
        """Each beside the first's result."""
        operands, found = packed.Operands.random(product, m, self._scheme, "cuda"), []
        operands.out.zero_()
        operands.calls(tiles[0])[0]()
        truth = operands.out.clone()
        for tile in tiles:
            with report.case(f"{product.name} {m} {tile}"):
                operands.agree(tile, truth)
                found.append((median_us(operands.calls(tile), 5), tile))
        if m >= 128:
            found.append((packed.dense_us(product, m, self._scheme), None))
        return found

    def key(self, product: Product) -> tuple[object, ...]:
        """As `packed_tiles.TUNED` has it."""
        return self._bits, product.gates, product.n, product.k


SCHEMES_OF: dict[str, Callable[[], Tunable]] = {
    "dense": Dense,
    "w4a16": lambda: PackedBits("w4a16"),
    "w8a16": lambda: PackedBits("w8a16"),
}


def compile_one(name: str, product: Product, m: int, tile: Any) -> str | None:
    """In a process of its own: puts the kernel into Triton's cache on disk. Returns what went wrong."""
    try:
        for kernel, grid, arguments, options in SCHEMES_OF[name]().launches(product, m, tile):
            kernel.warmup(*arguments, grid=grid, **options)
    except Exception as error:
        return f"{type(error).__name__} {str(error)[:200]}"
    return None


def dry(names: list[str], found: list[Product], rows: list[int], most: int) -> None:
    """Compiles without a card, and says what each candidate takes."""
    import compiling

    def launches(name: str, product: Product, m: int, tile: Any) -> Callable[[], None]:
        def launch() -> None:
            for kernel, grid, arguments, options in SCHEMES_OF[name]().launches(product, m, tile):
                kernel[grid](*arguments, **options)

        return launch

    cases = {}
    for name in names:
        for product in found:
            for m in rows:
                for tile in SCHEMES_OF[name]().candidates(product, m):
                    cases[f"{name} {product.name} {m} {tuple(tile)}"] = launches(name, product, m, tile)
    print(len(cases), "candidates", flush=True)
    taken = dict(list(cases.items())[:most])
    for made in compiling._compiled(taken):
        bad = " SPILLS" * (made.spilled > 16) + " TOO LARGE" * (made.shared > products.SHARED_MEMORY)
        print(f"{made.case}: {made.registers} registers, {made.spilled} spilled, {made.shared} shared{bad}", flush=True)


def tune(name: str, found: list[Product], rows: list[int], report: Report, seconds: float) -> None:
    """Prints the table of one scheme."""
    tunable, deadline = SCHEMES_OF[name](), Deadline(seconds)
    wanted = {(product, m): tunable.candidates(product, m) for product in found for m in rows}
    context = multiprocessing.get_context("spawn")
    workers, begun = min(COMPILERS, max(1, (os.cpu_count() or 2) - 2)), time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {
            (case, tile): pool.submit(compile_one, name, *case, tile)
            for case, tiles in wanted.items()
            for tile in tiles
        }
        errors = {key: job.result() for key, job in jobs.items()}
    print(f"{name}: {len(jobs)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)
    table: dict[tuple[object, ...], list[tuple[int, Any]]] = {}
    for (product, m), tiles in wanted.items():
        whole = [tile for tile in tiles if errors[(product, m), tile] is None]
        if not whole or deadline.passed(f"{name} {product.name} at {m} rows"):
            continue
        times: list[tuple[float, Any]] = []
        with report.case(f"{name} {product.name} {m}"):
            times = sorted(tunable.times(product, m, whole, report), key=lambda each: each[0])
        if not times:
            continue
        ruled = next((us for us, tile in times if tile == tiles[0]), float("inf"))
        best = times[0] if times[0][0] < BARELY * ruled else (ruled, tiles[0])
        table.setdefault(tunable.key(product), []).append((m, best[1]))
        report.result(
            "tuned", scheme=name, product=product.name, m=m, us=best[0], rule_us=ruled, best=best[1], next=times[:3]
        )
    kind = card_of(torch.device("cuda")).kind
    print(f"# {tunable.table}, TUNED, {torch.cuda.get_device_name()}:\n    {kind!r}: {{")
    for key, entries in table.items():
        print(f"        {key!r}: [")
        for m, tile in entries:
            print(f"            ({m}, {tile!r}),")
        print("        ],")
    print("    },", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="tables of tiles for the card at hand")
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--schemes", default=",".join(SCHEMES_OF), help="separated by commas")
    parser.add_argument("--products", default="qkv,o,gate_up,down,head", help="separated by commas")
    parser.add_argument("--rows", default="1,2,4,8,16,32,64,128,256,512", help="of x")
    parser.add_argument("--seconds", type=float, default=100, help="of measuring a scheme")
    parser.add_argument("--dry", action="store_true", help="only compile, on a machine without a card")
    parser.add_argument("--most", type=int, default=1000, help="of the candidates that --dry compiles")
    arguments = parser.parse_args()
    names, rows = arguments.schemes.split(","), list(map(int, arguments.rows.split(",")))
    if unknown := set(names) - set(SCHEMES_OF):
        parser.error(f"unknown schemes {sorted(unknown)}; there are {sorted(SCHEMES_OF)}")
    found = [
        product for product in products_of(SHAPES[arguments.shape]) if product.name in arguments.products.split(",")
    ]
    if arguments.dry:
        dry(names, found, rows, arguments.most)
        return
    torch.manual_seed(0)
    report = Report()
    report.result("device", name=torch.cuda.get_device_name(), torch=torch.__version__, shape=arguments.shape)
    for name in names:
        tune(name, found, rows, report, arguments.seconds)


if __name__ == "__main__":
    main()
