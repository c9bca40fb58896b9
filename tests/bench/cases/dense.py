"""The dense products of a decode step as they are chosen by the rules (or by a sweep), one by one and as a chain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases.products import (
    DTYPE,
    SHAPES,
    Operands,
    Product,
    Shape,
    Sweep,
    Variant,
    products_of,
)
from cases.timing import Deadline, Report, median_us
from torch import Tensor

from lightllmd.kernels import tiles
from lightllmd.kernels.norm import rms_norm

POOL = 1_060_000_000  # elements that the weights are slices of: two heads, or four layers, of the largest shape
Multiply = Callable[..., None]


def measure(name: str, rows: tuple[int, ...], sweeps: bool, report: Report) -> None:
    shape = SHAPES[name]
    pool = torch.empty(POOL, device="cuda", dtype=DTYPE)
    for part in pool.split(1 << 26):
        part.normal_(0, 0.02)
    sweep = Sweep(pool, report)
    products = products_of(shape)
    if sweeps:
        sweep.run(products, rows, Deadline(240))
    chosen = {(p.name, m): sweep.best.get((p.name, m)) or by_rule(p, m) for p in products for m in rows}
    sweep.compile(
        [
            (p, m, v._replace(fused=f))
            for p in products
            for m in rows
            for v in [chosen[p.name, m]]
            for f in fusions(p, v)
        ]
    )
    deadline = Deadline(60)
    for m in rows:
        if deadline.passed(f"products at {m} rows"):
            break
        singles(products, m, pool, chosen, report)
        chains(shape, products, m, pool, chosen, report)


def by_rule(product: Product, m: int) -> Variant:
    return Variant(tiles.tile_for(m, product.n, product.k, DTYPE, product.gates))


def fusions(product: Product, variant: Variant) -> list[bool]:
    """Whether the norm is inside: both where both can be."""
    return [False, True] if product.normed and variant.tile.gemv else [False]


def singles(
    products: list[Product],
    m: int,
    pool: Tensor,
    chosen: dict[tuple[str, int], Variant],
    report: Report,
) -> None:
    sums = {"cublas": 0.0, "ours": 0.0, "cublas_whole": 0.0, "ours_whole": 0.0}
    for product in products:
        with report.case(f"{product.name} {m}"):
            operands = Operands(product, m, pool, "cuda")
            variant = chosen[product.name, m]
            times: dict[str, float] = {}
            for fused in fusions(product, variant):
                each = variant._replace(fused=fused)
                operands.check(each)
                if not fused:
                    times["ours"] = median_us(operands.calls(operands.ours(each, False)))
                times["ours_fused" if fused else "ours_whole"] = median_us(operands.calls(operands.ours(each, True)))
            times["cublas"] = median_us(operands.calls(operands.cublas(False)))
            times["cublas_whole"] = median_us(operands.calls(operands.cublas(True)))
            report.result(
                "product",
                product=product.name,
                m=m,
                ours_tbps=product.size / times["ours"] / 1e6,
                cublas_tbps=product.size / times["cublas"] / 1e6,
                tile=tuple(variant.tile),
                **{f"{key}_us": value for key, value in times.items()},
            )
            whole = min(times["ours_whole"], times.get("ours_fused", times["ours_whole"]))
            for key, value in {**times, "ours_whole": whole}.items():
                if key in sums:
                    sums[key] += value * product.per_step / 1e3
    report.result("products_sum", m=m, **{f"{key}_ms": value for key, value in sums.items()})


# --- the chain ----------------------------------------------------------------------------------------------------


def chains(
    shape: Shape,
    products: list[Product],
    m: int,
    pool: Tensor,
    chosen: dict[tuple[str, int], Variant],
    report: Report,
) -> None:
    """All products of a step in their order, each reading what the one before it wrote; attention left out."""
    times: dict[str, float] = {}
    every = {product.name: product for product in products}
    for how in ("cublas", "separate", "separate_pdl", "fused", "fused_pdl"):
        if how.startswith("fused") and not any(True in fusions(p, chosen[p.name, m]) for p in products):
            continue
        with report.case(f"chain {m} {how}"):
            buffers = {name: Operands(product, m, pool, "cuda") for name, product in every.items()}
            connect(shape, buffers)

            def multiply(name: str, weight: Tensor, how: str = how, buffers: dict[str, Operands] = buffers) -> None:
                operands = buffers[name]
                if how == "cublas":
                    operands.cublas(True)(weight)
                    return
                variant = chosen[name, m]
                fused = how.startswith("fused") and True in fusions(every[name], variant)
                operands.ours(variant._replace(fused=fused, pdl=how.endswith("pdl")), True)(weight)

            calls = [
                lambda name=name, weight=weight: multiply(name, weight)  # type: ignore[misc]
                for name, weight in step_of(shape, every, pool)
            ]
            for call in calls[:4] + calls[-1:]:
                call()
            times[how] = median_us(calls) * len(calls) / 1e3
    size = sum(product.size * product.per_step for product in products)
    best = min(times, key=lambda key: times[key])
    report.result(
        "chain", m=m, best=best, tbps=size / times[best] / 1e9, **{f"{key}_ms": value for key, value in times.items()}
    )


def connect(shape: Shape, buffers: dict[str, Operands]) -> None:
    """The outputs of products become the inputs of the next, the residual stream is one buffer."""
    stream = buffers["qkv"].x
    for name in ("gate_up", "head"):
        buffers[name].x = stream
    for name in ("o", "down"):
        buffers[name].out = stream
    buffers["o"].x = buffers["qkv"].out[:, : shape.heads * shape.head_dim]
    buffers["down"].x = buffers["gate_up"].out
    normed = buffers["qkv"].normed
    for name in ("gate_up", "head"):
        buffers[name].normed = normed
    rms_norm(stream, buffers["qkv"].norm, normed)


def step_of(shape: Shape, products: dict[str, Product], pool: Tensor) -> list[tuple[str, Tensor]]:
    """The products of a step with their weights: as many layers' as the pool holds, then from its beginning again."""
    found, at = [], 0
    layer = [products[name] for name in ("qkv", "o", "gate_up", "down")]
    for _ in range(shape.layers):
        if at + sum(product.n * product.k for product in layer) > len(pool):
            at = 0
        for product in layer:
            size = product.n * product.k
            found.append((product.name, pool[at : at + size].view(product.n, product.k)))
            at += size
    head = products["head"]
    found.append(("head", pool[: head.n * head.k].view(head.n, head.k)))
    return found
