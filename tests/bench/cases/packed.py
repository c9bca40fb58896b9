"""Products with weights of 4 and 8 bits: every linear of a decoder layer beside its bf16 form, and candidate tiles.

Times are those of whole linears, with the norm, activation or residual that stands around each in a layer. The limit of
one is the bytes of its weight, scales and zeros over the card's copy rate, or its arithmetic over `FLOPS`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from cases.products import DTYPE, EPS, SHAPES, Product, products_of
from cases.timing import BEYOND_CACHE, Deadline, Report, copies_for, median_us, require_close
from torch import Tensor

from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.kernels import reference
from lightllmd.kernels.cards import card_of
from lightllmd.kernels.fused import FusedKernels
from lightllmd.kernels.fused_linear import normed
from lightllmd.kernels.linear import Linear, Norm
from lightllmd.kernels.packed import tiles as packed_tiles
from lightllmd.kernels.packed.linear import ARRIVALS, FusedPackedLinear
from lightllmd.kernels.packed.matmul import PackedWeight, launches
from lightllmd.kernels.packed.tiles import PackedTile
from lightllmd.kernels.quantised import quantise
from lightllmd.kernels.skinny import Launch

FLOPS = 779e12  # of bf16 on an H200, measured through cuBLAS
BITS = {"w4a16": 4, "w8a16": 8}


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a second, of a tensor far beyond the cache."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / (median_us([lambda: target.copy_(source)]) * 1e-6)


def linears(product: Product, name: str) -> list[Linear]:
    """Copies that take turns, more of them together than a cache holds. `name`: a scheme's."""
    kernels = FusedKernels(torch.device("cuda"))
    weight = torch.empty(product.n, product.k, device="cuda", dtype=DTYPE)
    for part in weight.split(4096):
        part.normal_(0, 0.02)
    first = kernels.linear(product.name, weight, None, SCHEMES[name])
    size = sum(tensor.nbytes for tensor in first.tensors().values())
    return [first, *(copied(first) for _ in range(copies_for(size) - 1))]


def copied(linear: Linear) -> Linear:
    """The same with memory of its own."""
    twin = copy.copy(linear)
    if isinstance(twin, FusedPackedLinear):
        twin._packed = twin._packed._replace(values=twin._packed.values.clone())
    else:
        twin.weight = twin.weight.clone()  # type: ignore[attr-defined]
    return twin


def call_of(product: Product, m: int) -> tuple[Tensor, Norm, Tensor, Callable[[Linear], Tensor]]:
    """x, norm, residual stream, and what calls a linear as a layer does."""
    x = torch.randn(m, product.k, device="cuda", dtype=DTYPE)
    norm = Norm(torch.rand(product.k, device="cuda", dtype=DTYPE) + 0.5, EPS)
    stream = torch.randn(m, product.n, device="cuda", dtype=DTYPE) if product.adds else None

    def call(linear: Linear) -> Tensor:
        given = norm if product.normed else None
        return linear(x, norm=given, activation="silu" if product.gates else None, residual=stream)

    return x, norm, stream, call


def check(product: Product, m: int, linear: Linear, scheme: Scheme) -> None:
    """One call against the numbers that the scheme gives a weight of its own."""
    weight = torch.randn(product.n, product.k, device="cuda", dtype=DTYPE) * 0.02
    quantised = quantise(weight, scheme)
    made = FusedKernels(torch.device("cuda")).linear(product.name, quantised, None)
    x, norm, stream, call = call_of(product, m)
    wide = x.float()
    if product.normed:
        wide = reference.rms_norm(wide, norm.weight.float(), EPS, 0.0)
    truth = wide @ quantised.dense(torch.float32).T
    if product.gates:
        truth = reference.gated(truth, "silu")
    if stream is not None:
        truth += stream.float()
    require_close(call(made), truth, 1e-2)


def measure(shape: str, rows: tuple[int, ...], only_check: bool, report: Report) -> None:
    deadline = Deadline(280)
    products = [product for product in products_of(SHAPES[shape]) if product.name != "head"]
    rate = 1.0 if only_check else copy_rate()
    if not only_check:
        report.result("copy", tbps=rate / 1e12)
    sums: dict[tuple[str, int], float] = {}
    for product in products:
        made = {name: linears(product, name) for name in ("dense", *BITS)}
        for m in rows:
            if deadline.passed(f"{product.name} at {m} rows"):
                break
            for name, each in made.items():
                with report.case(f"{product.name} {name} {m}"):
                    if name != "dense":
                        check(product, m, each[0], SCHEMES[name])
                    if only_check:
                        continue
                    _, _, _, call = call_of(product, m)
                    call(each[0])
                    calls = [functools.partial(call, each[i % len(each)]) for i in range(max(16, len(each)))]
                    us = median_us(calls)
                    size = sum(tensor.nbytes for tensor in each[0].tensors().values())
                    limit = 1e6 * max(size / rate, 2.0 * product.n * product.k * m / FLOPS)
                    sums[name, m] = sums.get((name, m), 0.0) + us * product.per_step / 1e3
                    report.result(product.name, scheme=name, m=m, us=us, tbps=size / us / 1e6, of_limit=limit / us)
    for m in rows:
        report.result("sum", m=m, **{f"{name}_ms": sums[name, m] for name in ("dense", *BITS) if (name, m) in sums})
    if only_check:
        print("CHECKED", len(products) * len(rows) * len(BITS), "products, errors above if any", flush=True)


# --- candidates for `tune.py` -------------------------------------------------------------------------------------


class Operands(NamedTuple):
    """x, out and packed weights that take turns, of any bits: only their time counts."""

    product: Product
    x: Tensor
    norm: Norm
    out: Tensor
    weights: list[PackedWeight]
    arrived: Tensor

    @classmethod
    def random(cls, product: Product, m: int, scheme: Scheme, device: str) -> Operands:
        n, k, bits = product.n, product.k, 4 if scheme.values == "uint4" else 8
        groups, size = scheme.groups(k), n * k * bits // 8
        count = copies_for(size) if device == "cuda" else 1
        pool = torch.empty(max(size * count, 1), dtype=torch.uint8, device=device)
        if device == "cuda":
            pool.random_(0, 256)
        scale = torch.full((groups, n), 0.01, device=device, dtype=DTYPE if bits == 4 else torch.float32)
        zero = None if scheme.symmetric else torch.full((groups, n), 8, device=device, dtype=torch.uint8)
        stored = [pool[i * size : (i + 1) * size].view(torch.int16 if bits == 4 else torch.int8) for i in range(count)]
        group = scheme.group if scheme.group < k else 0
        return cls(
            product,
            torch.randn(m, k, dtype=DTYPE).to(device),
            Norm(torch.ones(k, device=device, dtype=DTYPE), EPS),
            torch.zeros(m, n // 2 if product.gates else n, device=device, dtype=DTYPE),
            [PackedWeight(values, scale, zero, n, k, bits, group) for values in stored],
            torch.zeros(ARRIVALS, dtype=torch.int32, device=device),
        )

    def launches(self, tile: PackedTile, index: int = 0) -> list[Launch]:
        """As the linear launches it, behind a norm of its own."""
        rows = len(self.x)
        fuses = self.product.normed and packed_tiles.fuses_norm(tile, rows, DTYPE, 0.0)
        norm = self.norm if fuses else None
        residual, activation = self.out if self.product.adds else None, "silu" if self.product.gates else None
        pdl = packed_tiles.overlaps(rows, self.product.n)
        weight = self.weights[index % len(self.weights)]
        return launches(self.x, weight, self.out, tile, self.arrived, norm, None, residual, activation, pdl)

    def calls(self, tile: PackedTile) -> list[Callable[[], object]]:
        fuses = packed_tiles.fuses_norm(tile, len(self.x), DTYPE, 0.0)

        def call(index: int) -> None:
            if self.product.normed and not fuses:
                normed(self.x, self.norm)
            for kernel, grid, arguments, options in self.launches(tile, index):
                kernel[grid](*arguments, **options)

        return [functools.partial(call, index) for index in range(max(16, len(self.weights)))]

    def agree(self, tile: PackedTile, truth: Tensor) -> None:
        """One call's result is that of the derived tile, which the tests hold to the reference."""
        self.out.zero_()
        self.calls(tile)[0]()
        require_close(self.out, truth, 1e-2)


def candidates(product: Product, m: int, scheme: Scheme) -> list[PackedTile]:
    """The derived tile first, then what fits beside it."""
    bits, card = (
        4 if scheme.values == "uint4" else 8,
        card_of(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    )
    derived = packed_tiles.tile_for(card, m, product.n, product.k, bits, scheme.group, product.gates)
    found = [] if derived is None else [derived]
    step = packed_tiles.largest_step(scheme.group, product.k)
    if packed_tiles.fits_gemv(m, product.n, product.k, bits, scheme.group, product.gates):
        for tiles in (2, 4, 8) if product.gates else (1, 2, 4):
            found += [PackedTile("gemv", 1, 16 * tiles, warps, step, 1) for warps in (4, 8, 16)]
    if m <= 16:
        block_m = max(8, 1 << (m - 1).bit_length())
        found += [PackedTile("skinny", block_m, 32, 8, 2, 3), PackedTile("skinny", block_m, 64, 4, 2, 3)]
    if m > 1:
        block_m = min(256, max(16, 1 << (m - 1).bit_length()))
        for rows in {block_m, min(block_m, 128)}:
            for block_n, warps in ((64, 4), (128, 4), (128, 8)):
                if rows >= 128 and block_n // warps > 16:
                    continue
                splits = (1, 2, 4, 8) if product.n <= 64 * card.multiprocessors else (1,)
                found += [PackedTile("wide", rows, block_n, warps, 2, 3, split) for split in splits]
                found.append(PackedTile("wide", rows, block_n, warps, 1, 4, splits[-1]))
    fitting = [tile._replace(blocks=min(step, tile.blocks)) for tile in found]
    return list(dict.fromkeys(tile for tile in fitting if packed_tiles.staged(tile, bits) <= card.shared - 4096))


def dense_us(product: Product, m: int, scheme: Scheme) -> float:
    """Microseconds of the matmul with the weight made dense for cuBLAS, whatever the number of rows."""
    weight = torch.randn(product.n, product.k, device="cuda", dtype=DTYPE) * 0.02
    linear = FusedKernels(torch.device("cuda")).linear(product.name, weight, None, scheme)
    assert isinstance(linear, FusedPackedLinear)
    x = torch.randn(m, product.k, device="cuda", dtype=DTYPE)
    stream = torch.randn(m, product.n, device="cuda", dtype=DTYPE) if product.adds else None
    activation, count = "silu" if product.gates else None, max(2, min(8, BEYOND_CACHE // (2 * product.n * product.k)))
    return median_us([lambda: linear._dense_matmul(x, activation, stream)] * count)
