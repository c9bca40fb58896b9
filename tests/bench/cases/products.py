"""Dense products of a decode step: ours beside cuBLAS's, each with what stands around it in a layer.

Cases: *qkv* with the RMS norm before it, *o* and *down* with the residual added, *gate_up* with norm and activation,
*head* with norm and fp32 logits. cuBLAS needs kernels of their own for norm and activation, and they are counted.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from cases.timing import Deadline, Report, copies_for, median_us, require_close
from torch import Tensor

from lightllmd.kernels import skinny, tiles
from lightllmd.kernels.activation import gated
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.norm import rms_norm
from lightllmd.kernels.tiles import Tile

DTYPE = torch.bfloat16
EPS = 1e-5
SHARED_MEMORY = 227 * 1024  # bytes of an H100's multiprocessor that one program may have
COMPILERS = 14  # processes


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int


SHAPES = {
    "8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936),
    "135m": Shape(30, 576, 9, 3, 64, 1536, 49152),
    # What each of two ranks has. Its o and down are summed with the other's, so they add nothing to the residual.
    "8b/2": Shape(32, 4096, 16, 4, 128, 7168, 64128),
    "70b/2": Shape(80, 8192, 32, 4, 128, 14336, 64128),
}


class Product(NamedTuple):
    name: str
    n: int
    k: int
    normed: bool  # an RMS norm stands before it
    adds: bool  # into the residual stream
    gates: bool
    per_step: int

    @property
    def size(self) -> int:
        """Bytes of the weight."""
        return 2 * self.n * self.k


def products_of(shape: Shape) -> list[Product]:
    attention, kv = shape.heads * shape.head_dim, 2 * shape.kv_heads * shape.head_dim
    hidden, inner, layers = shape.hidden, shape.intermediate, shape.layers
    return [
        Product("qkv", attention + kv, hidden, True, False, False, layers),
        Product("o", hidden, attention, False, True, False, layers),
        Product("gate_up", 2 * inner, hidden, True, False, True, layers),
        Product("down", hidden, inner, False, True, False, layers),
        Product("head", shape.vocab, hidden, True, False, False, 1),
    ]


class Variant(NamedTuple):
    tile: Tile
    fused: bool = False  # the norm inside the product, where there is one
    pdl: bool = False


class Operands:
    """x, norm weight, out and residual of a product with M rows, and weights that take turns."""

    def __init__(self, product: Product, m: int, pool: Tensor, device: str) -> None:
        n, k = product.n, product.k
        self.product, self.m = product, m
        self.x = torch.randn(m, k, device=device, dtype=DTYPE)
        self.norm = Norm(torch.rand(k, device=device, dtype=DTYPE) + 0.5, EPS)
        self.normed = torch.empty_like(self.x)
        made = n // 2 if product.gates else n
        self.out = torch.zeros(m, made, device=device, dtype=torch.float32 if product.name == "head" else DTYPE)
        self.wide = torch.empty(m, n, device=device, dtype=DTYPE) if product.gates else None
        count = copies_for(product.size) if device == "cuda" else 1
        self.weights = [pool[index * n * k : (index + 1) * n * k].view(n, k) for index in range(count)]

    def calls(self, run: Callable[[Tensor], object]) -> list[Callable[[], object]]:
        """At least 16 calls, the weights in turn."""
        count = max(len(self.weights), 16 if self.product.name != "head" else 4)
        return [lambda w=self.weights[index % len(self.weights)]: run(w) for index in range(count)]

    def launch(self, variant: Variant, weight: Tensor) -> skinny.Launch:
        product = self.product
        norm = self.norm if product.normed and variant.fused else None
        x = self.normed if product.normed and norm is None else self.x
        residual = self.out if product.adds else None
        activation = "silu" if product.gates else None
        return skinny.launch(x, weight, self.out, norm, None, residual, activation, variant.pdl, variant.tile)

    def ours(self, variant: Variant, with_norm: bool) -> Callable[[Tensor], None]:
        """`with_norm`: the separate norm counts too, where the variant does not fuse it."""
        norms = with_norm and self.product.normed and not variant.fused

        def run(weight: Tensor) -> None:
            if norms:
                rms_norm(self.x, self.norm, self.normed)
            kernel, grid, arguments, options = self.launch(variant, weight)
            kernel[grid](*arguments, **options)

        return run

    def cublas(self, whole: bool) -> Callable[[Tensor], None]:
        """`whole`: with norm and activation; else the bare product."""
        product = self.product

        def run(weight: Tensor) -> None:
            x = self.x
            if product.normed:
                x = self.normed
                if whole:
                    rms_norm(self.x, self.norm, self.normed)
            if product.adds:
                self.out.addmm_(x, weight.t())
            elif product.name == "head":
                torch.mm(x, weight.t(), out_dtype=torch.float32, out=self.out)
            elif product.gates:
                torch.mm(x, weight.t(), out=self.wide)
                if whole:
                    gated(self.wide, "silu", self.out)
            else:
                torch.mm(x, weight.t(), out=self.out)

        return run

    @functools.cached_property
    def _truth(self) -> tuple[Tensor, Tensor]:
        """What the residual stream was before, and what comes out with the last weight; fp32."""
        before = torch.randn(self.out.shape, device="cuda", dtype=self.out.dtype).float()
        x = self.x.float()
        if self.product.normed:
            x = functional.rms_norm(x, (self.product.k,), self.norm.weight.float(), EPS)
        truth = x @ self.weights[-1].float().T
        if self.product.gates:
            gate, up = truth.chunk(2, -1)
            truth = functional.silu(gate) * up
        return before, truth + before if self.product.adds else truth

    def check(self, variant: Variant) -> None:
        """One call against torch, out poisoned where it is not read."""
        before, truth = self._truth
        if self.product.adds:
            self.out.copy_(before)
        else:
            self.out.fill_(float("nan"))
        self.ours(variant, True)(self.weights[-1])
        require_close(self.out, truth, 1e-2)


# --- the sweep ----------------------------------------------------------------------------------------------------

# (block_n, block_k, warps, stages) by rows of a block
DOTS: dict[int, list[tuple[int, int, int, int]]] = {
    16: [
        *((16, 128, 4, 6), (16, 256, 2, 4), (16, 256, 4, 4), (16, 256, 4, 6), (16, 512, 4, 3)),
        *((32, 128, 4, 4), (32, 128, 4, 6), (32, 256, 4, 3), (32, 256, 4, 4), (64, 128, 4, 4)),
    ],
    32: [
        *((16, 256, 4, 4), (16, 512, 4, 3), (32, 64, 4, 6), (32, 128, 4, 4), (32, 128, 4, 6)),
        *((32, 256, 4, 3), (32, 256, 4, 4), (64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 8, 4)),
    ],
    64: [
        *((16, 256, 4, 4), (32, 64, 4, 6), (32, 128, 4, 3), (32, 128, 4, 4), (32, 128, 4, 5)),
        *((32, 256, 4, 3), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 8, 4)),
    ],
    128: [
        *((32, 64, 4, 5), (32, 128, 4, 4), (64, 64, 8, 4), (64, 128, 8, 4), (128, 64, 8, 3)),
        *((128, 64, 8, 6), (128, 128, 8, 3)),
    ],
}


def gemv_candidates(m: int, k: int, gates: bool) -> list[Tile]:
    found = []
    for block_k in (512, 1024, 2048, 4096):
        if block_k >= 2 * k or (k % block_k and block_k < k):
            continue
        for block_n in (1, 2, 4, 8):
            for warps in (2, 4, 8):
                held = block_n * block_k // (32 * warps)  # elements of the weight per thread
                if (gates and block_n == 1) or block_k < 256 * warps or not 8 <= held <= 64 or held * m > 160:
                    continue
                found.append(Tile(True, block_n, block_k, warps, 1))
        if block_k == 1024:
            found += [Tile(True, 2, 1024, 4, 3), Tile(True, 4, 1024, 4, 3), Tile(True, 2, 1024, 4, 5)]
    return found


def candidates(product: Product, m: int) -> list[Tile]:
    found = gemv_candidates(m, product.k, product.gates) if m <= tiles.GEMV_ROWS // 2 else []
    rows = tiles.block_rows(m)
    for block_n, block_k, warps, stages in DOTS[rows] if m > 1 else ():
        if (rows + block_n) * block_k * 2 * (stages - 1) <= SHARED_MEMORY and block_k <= product.k:
            found.append(Tile(False, block_n, block_k, warps, stages))
    return found


def precompile(product: Product, m: int, variant: Variant) -> str | None:
    """In a process of its own: puts the kernel into Triton's cache on disk. Returns what went wrong."""
    operands = Operands(product, m, torch.empty(product.n * product.k, device="meta", dtype=DTYPE), "meta")
    kernel, grid, arguments, options = operands.launch(variant, operands.weights[0])
    try:
        kernel.warmup(*arguments, grid=grid, **options)
    except Exception as error:
        return f"{type(error).__name__} {str(error)[:200]}"
    return None


class Sweep:
    """Times every candidate tile of every product; remembers the best."""

    def __init__(self, pool: Tensor, report: Report) -> None:
        self.pool, self.report = pool, report
        self.best: dict[tuple[str, int], Variant] = {}
        context = multiprocessing.get_context("spawn")
        workers = min(COMPILERS, max(1, (os.cpu_count() or 2) - 2))
        self.compilers = ProcessPoolExecutor(workers, mp_context=context)

    def compile(self, wanted: list[tuple[Product, int, Variant]]) -> None:
        begun = time.monotonic()
        futures = [self.compilers.submit(precompile, *each) for each in wanted]
        for (product, m, variant), future in zip(wanted, futures, strict=True):
            error = future.result()
            if error is not None:
                print("ERROR compiling", product.name, m, variant, error, flush=True)
        print(f"{len(wanted)} kernels compiled in {time.monotonic() - begun:.0f} s", flush=True)

    def time(self, product: Product, m: int, variants: list[Variant]) -> list[tuple[float, Variant]]:
        """Microseconds of the bare product (with a fused norm where the variant has one), fastest first."""
        operands, found = Operands(product, m, self.pool, "cuda"), []
        for variant in variants:
            with self.report.case(f"{product.name} {m} {variant}"):
                operands.check(variant)
                calls = operands.calls(operands.ours(variant, False))
                found.append((median_us(calls, 5), variant))
        return sorted(found, key=lambda each: each[0])

    def run(self, products: list[Product], rows: tuple[int, ...], deadline: Deadline) -> None:
        cases = [(product, m) for m in rows for product in products]
        self.compile([(p, m, Variant(tile)) for p, m in cases for tile in candidates(p, m)])
        timed = {}
        for product, m in cases:
            if not deadline.passed(f"sweep of {product.name} at {m}"):
                timed[product, m] = self.time(product, m, [Variant(tile) for tile in candidates(product, m)])
        second = {case: finalists([variant for _, variant in found], case) for case, found in timed.items()}
        self.compile([(*case, variant) for case, variants in second.items() for variant in variants])
        for (product, m), found in timed.items():
            if not found:
                continue
            final = self.time(product, m, second[product, m])
            plain = min(found + [each for each in final if not each[1].pdl and not each[1].fused], key=lambda e: e[0])
            self.best[product.name, m] = plain[1]
            self.report.result(
                "sweep",
                product=product.name,
                m=m,
                us=plain[0],
                tbps=product.size / plain[0] / 1e6,
                best=tuple(plain[1].tile),
                next=[(round(us, 2), *variant.tile) for us, variant in found[:4]],
                others=[
                    (round(us, 2), "fused" * variant.fused, "pdl" * variant.pdl, variant.tile.evict)
                    for us, variant in final
                ],
            )


def finalists(sorted_variants: list[Variant], case: tuple[Product, int]) -> list[Variant]:
    """Of the fastest tile: its cache hint, programmatic launch, and the norm inside (of the best gemv, if any)."""
    if not sorted_variants:
        return []
    product = case[0]
    best = sorted_variants[0].tile
    hinted = best._replace(evict="evict_first")
    found = [Variant(hinted), Variant(best, pdl=True), Variant(hinted, pdl=True)]
    if product.normed and best.gemv:
        found += [Variant(best, fused=True), Variant(best, fused=True, pdl=True)]
    return found
