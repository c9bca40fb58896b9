"""Matmuls of a step with weights and inputs of 8 bits, as a decoder calls them: each by itself beside bf16's, beside
what else there is for it, and as the chain of a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from cases.products import DTYPE, EPS, SHAPES, Product, Shape, products_of
from cases.timing import Deadline, Report, copies_for, median_us, require_close
from torch import Tensor

from lightllmd.architecture.schemes import DENSE, SCHEMES, Scheme
from lightllmd.kernels.fused import FusedKernels
from lightllmd.kernels.linear import Linear, Norm
from lightllmd.kernels.quantised import LEVELS, QuantisedMatrix, quantised_inputs
from lightllmd.kernels.w8a8 import tiles as w8a8_tiles
from lightllmd.kernels.w8a8.linear import FAST_SUMS, FusedW8A8Linear
from lightllmd.kernels.w8a8.matmul import linear
from lightllmd.kernels.w8a8.rounded_rows import quantise_rows
from lightllmd.kernels.w8a8.tiles import Tile8, WholeTile

NAMES = ("fp8", "w8a8", "fp8_block")
BANDWIDTH, RATE = 4.12e12, 1.56e15  # of an H200: bytes copied a second, twice what bf16 reaches
LAYERS = 8  # of distinct weights in a chain; times are told for all of the shape's


def measure(name: str, rows: tuple[int, ...], sweeps: bool, checks_only: bool, report: Report) -> None:
    """`sweeps`: candidate tiles too, for `w8a8_tiles`. `checks_only`: results are compared, and nothing is timed."""
    shape, kernels = SHAPES[name], FusedKernels(torch.device("cuda"))
    products = [product for product in products_of(shape) if product.name != "head"]
    deadline = Deadline(360)
    for scheme in (SCHEMES[each] for each in NAMES):
        for product in products:
            with report.case(f"check {scheme.name} {product.name}"):
                check(kernels, scheme, product, rows, report)
    if checks_only:
        return
    bf16 = {(p.name, m): alone(kernels, DENSE, p, m) for p in products for m in rows}
    for scheme in (SCHEMES[each] for each in NAMES):
        for m in rows:
            for product in products:
                if deadline.passed(f"{scheme.name} {product.name} at {m}"):
                    return
                with report.case(f"{scheme.name} {product.name} {m}"):
                    us, least = alone(kernels, scheme, product, m), limit_us(scheme, product, m)
                    others = rivals(kernels, scheme, product, m, sweeps)
                    found = {"us": us, "limit": f"{least / us:.0%}", "bf16_us": bf16[product.name, m]}
                    report.result(f"w8a8 {scheme.name}", product=product.name, m=m, **found, **others)
    for m in rows:
        for each in ("dense", *NAMES):
            if deadline.passed(f"chain of {each} at {m}"):
                return
            with report.case(f"chain {each} {m}"):
                scheme = SCHEMES[each]
                ms = chain(kernels, scheme, shape, products, m)
                least = sum(limit_us(scheme, product, m) for product in products) * shape.layers / 1e3
                report.result("w8a8 chain", scheme=each, m=m, ms=ms, limit_ms=least, limit=f"{least / ms:.0%}")


def limit_us(scheme: Scheme, product: Product, m: int) -> float:
    """Of reading the weight once, or of the arithmetic."""
    size = scheme.nbytes((product.n, product.k), 2)
    return 1e6 * max(size / BANDWIDTH, 2 * m * product.n * product.k / (RATE / (2 if scheme.dense else 1)))


def made(kernels: FusedKernels, scheme: Scheme, product: Product, seed: int = 1) -> Linear:
    """A linear of random values. `seed` is not that of the inputs, which rows of the weight would be equal to: sums of
    4096 products of one sign are off by 3 % in fast sums."""
    n, k = product.n, product.k
    generator = torch.Generator("cuda").manual_seed(seed)
    if scheme.dense:
        return kernels.linear(product.name, torch.randn(n, k, device="cuda", generator=generator).to(DTYPE) / 64, None)
    level = LEVELS[scheme.values]
    values = torch.rand(n, k, device="cuda", generator=generator).sub_(0.5).mul_(2 * level)
    values = values.round_() if scheme.values == "int8" else values
    scales = (torch.rand(n, scheme.groups(k), device="cuda", generator=generator) + 0.5) / (level * 64)
    weight = QuantisedMatrix(scheme, values.to(getattr(torch, scheme.values)), scales)
    return kernels.linear(product.name, weight, None)


@dataclass
class Inputs:
    """What a decoder calls a linear with."""

    product: Product
    x: Tensor
    norm: Norm
    residual: Tensor

    @classmethod
    def random(cls, product: Product, m: int) -> Inputs:
        x = torch.randn(m, product.k, device="cuda", dtype=DTYPE)
        norm = Norm(torch.rand(product.k, device="cuda", dtype=DTYPE) + 0.5, EPS)
        return cls(product, x, norm, torch.randn(m, product.n, device="cuda", dtype=DTYPE))

    def call(self, multiply: Linear) -> Tensor:
        """Gated by a linear of its own where the activation is left to the next: see `chain`."""
        if self.product.adds:
            return multiply(self.x, residual=self.residual)
        if self.product.gates:
            found = multiply(self.x, norm=self.norm, activation="silu")
            return found if isinstance(found, Tensor) else found.tensor()
        return multiply(self.x, norm=self.norm)


def check(kernels: FusedKernels, scheme: Scheme, product: Product, rows: tuple[int, ...], report: Report) -> None:
    """Against the scheme in fp32, and the values of inputs bit for bit."""
    multiply = made(kernels, scheme, product)
    assert isinstance(multiply, FusedW8A8Linear)
    group = scheme.group or product.k
    stored = multiply.weight.values.float() * spread(multiply.weight.scales.t(), group, product.k)
    torch.backends.cuda.matmul.allow_tf32 = False
    for m in rows:
        inputs = Inputs.random(product, m)
        inputs.x[0, ::7] = inputs.x[0].abs().amax() / 2  # halfway between values of int8
        values, scales = quantised_inputs(inputs.x, scheme)
        ours = quantise_rows(inputs.x, scheme)
        if not torch.equal(ours.values.float(), values.float()) or not torch.equal(ours.scales.t(), scales):
            raise ValueError(f"inputs at {m} rows are rounded otherwise than the scheme says")
        x = inputs.x.float()
        if product.normed:
            x = functional.rms_norm(x, (product.k,), inputs.norm.weight.float(), EPS)
        values, scales = quantised_inputs(x, scheme)
        truth = (values.float() * spread(scales, group, product.k)) @ stored.t()
        if product.gates:
            gate, up = truth.chunk(2, -1)
            truth = functional.silu(gate) * up
        if product.adds:
            truth += inputs.residual.float()
        require_close(inputs.call(multiply), truth, 1e-2)
        report.result("w8a8 check", scheme=scheme.name, product=product.name, m=m, right=True)


def spread(scales: Tensor, group: int, columns: int) -> Tensor:
    """``[R, G]`` -> ``[R, columns]``."""
    return scales.repeat_interleave(group, 1)[:, :columns]


def alone(kernels: FusedKernels, scheme: Scheme, product: Product, m: int) -> float:
    """Microseconds, with everything that stands around it."""
    inputs = Inputs.random(product, m)
    count = copies_for(scheme.nbytes((product.n, product.k), 2), most=16)
    linears = [made(kernels, scheme, product, seed) for seed in range(count)]
    return median_us([lambda at=linears[turn % count]: inputs.call(at) for turn in range(max(16, count))])


def rivals(kernels: FusedKernels, scheme: Scheme, product: Product, m: int, sweeps: bool) -> dict[str, object]:
    """Microseconds of the bare matmul, inputs rounded before: ours by the rule, cuBLAS's, the best tiles."""
    count = copies_for(product.n * product.k, most=16)
    linears = [made(kernels, scheme, product, seed) for seed in range(count)]
    weights = [each.weight for each in linears if isinstance(each, FusedW8A8Linear)]
    plain = torch.randn(m, product.k, device="cuda", dtype=DTYPE)
    x = quantise_rows(plain, scheme)
    activation, wide = "silu" if product.gates else None, product.n // 2 if product.gates else product.n
    out = torch.zeros(m, wide, device="cuda", dtype=DTYPE)

    def timed(call: Callable[[int], object]) -> float:
        return median_us([lambda at=turn % count: call(at) for turn in range(max(16, count))], 5)

    def tiled(tile: Tile8 | WholeTile | None) -> float:
        given = plain if isinstance(tile, Tile8) and tile.gemv else x
        fused = {"residual": out if product.adds else None, "activation": activation, "tile": tile}
        return timed(lambda at: linear(given, weights[at], out, **fused))

    found: dict[str, object] = {"bare_us": tiled(None)}
    if scheme.values == "float8_e4m3fn" and not scheme.group:
        for fast in (FAST_SUMS, not FAST_SUMS):
            options = {"scale_a": x.scales.view(-1, 1), "out_dtype": DTYPE, "use_fast_accum": fast}

            def cublas(at: int, options: dict = options) -> Tensor:
                return torch._scaled_mm(x.values, weights[at].values.t(), scale_b=weights[at].scales, **options)

            found[f"cublas_{'fast' if fast else 'exact'}_us"] = timed(cublas)
    if scheme.values == "int8" and m > 16:
        found["int_mm_us"] = timed(lambda at: torch._int_mm(x.values, weights[at].values.t()))
    if sweeps:
        times = []
        for tile in candidates(m, scheme.group, product.gates):
            try:
                times.append((round(tiled(tile), 2), tuple(tile)))
            except Exception as error:  # does not fit
                print("SKIPPED", tile, type(error).__name__, flush=True)
        found["best"] = sorted(times)[:4]
    return found


def candidates(m: int, group: int, gated: bool) -> list[Tile8 | WholeTile]:
    """Tiles for `m` rows."""
    found: list[Tile8 | WholeTile] = []
    if m == 1:
        shapes = itertools.product((2, 4, 8, 16), (1024, 2048, 4096), (4, 8))
        found += [Tile8(True, rows, block, warps) for rows, block, warps in shapes if rows * block <= 256 * 32 * warps]
    if m <= w8a8_tiles.BLOCK_ROWS:
        for block_n in (16, 32, 64, 128):
            for block_k in (128, 256, 512):
                for stages in (3, 4, 6):
                    staged = (w8a8_tiles.block_rows(m) + block_n) * block_k * stages
                    if staged <= 200 << 10 and not (group and block_k > group):
                        swaps = (False, True) if block_n >= 64 else (False,)
                        found += [Tile8(False, block_n, block_k, 4, stages, swap) for swap in swaps]
    if m > 32:
        for rows, columns, warps in (
            (64, 64, 4),
            (64, 128, 4),
            (64, 256, 4),
            (128, 64, 4),
            (128, 128, 8),
            (128, 256, 8),
        ):
            if gated and columns == 256:
                continue
            found += [WholeTile(rows, columns, min(group or 128, 128), warps, stages) for stages in (3, 4)]
    return found


def chain(kernels: FusedKernels, scheme: Scheme, shape: Shape, products: list[Product], m: int) -> float:
    """Milliseconds of all layers' matmuls in their order, each reading what the one before it wrote; no attention."""
    every = {product.name: product for product in products}
    layers = [{name: made(kernels, scheme, product, at) for name, product in every.items()} for at in range(LAYERS)]
    stream = torch.randn(m, shape.hidden, device="cuda", dtype=DTYPE)
    norm = Norm(torch.rand(shape.hidden, device="cuda", dtype=DTYPE) + 0.5, EPS)

    def step(layer: dict[str, Linear]) -> None:
        attended = layer["qkv"](stream, norm=norm)[:, : shape.heads * shape.head_dim]
        hidden = layer["o"](attended.contiguous() if m == 1 else attended, residual=stream)
        layer["down"](layer["gate_up"](hidden, norm=norm, activation="silu"), residual=stream)

    return median_us([lambda layer=layer: step(layer) for layer in layers]) * shape.layers / 1e3
