"""What is put together of several ranks' linears, embeddings, heads and norms is what one has: on the kernels of GPUs,
in Triton's interpreter where there is none, and on torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lightllmd.architecture.schemes import SCHEMES, Scheme, scheme_of
from lightllmd.kernels.collectives import ALONE, Group
from lightllmd.kernels.devices import fused_kernels, kernels_for
from lightllmd.kernels.dispatch import Kernels
from lightllmd.kernels.linear import Norm, ProjectionNorm
from lightllmd.kernels.quantised import quantise, quantised_inputs
from lightllmd.kernels.schemes import Shard
from lightllmd.kernels.w8a8.rounded_rows import quantise_rows
from rank_models import OnAll, ranks

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo is for tensors in host memory")
CPU = torch.device("cpu")
# Each as one rank and with what several share: the scheme, how many inputs, and where the second rank's begin.
LINEARS = {
    "dense": (SCHEMES["dense"], 96, 40),
    "w4a16, a group that is cut": (scheme_of("w4a16", 64), 192, 96),
    "w8a16": (SCHEMES["w8a16"], 192, 64),
    "w8a8": (SCHEMES["w8a8"], 192, 64),
    "fp8": (SCHEMES["fp8"], 192, 128),
    "fp8_block": (SCHEMES["fp8_block"], 256, 128),
    "fp8_block, a group that is cut": (SCHEMES["fp8_block"], 256, 64),
}


def eager(group: Group) -> Kernels:
    return kernels_for(CPU, torch.float32, group)


def fused(group: Group) -> Kernels:
    return fused_kernels(CPU, group=group)


@pytest.fixture(scope="module")
def on_both() -> Iterator[OnAll[Any]]:
    with ranks(2, in_turns=True) as on_all:
        yield on_all


@pytest.mark.parametrize("kernels", [eager, fused])
@pytest.mark.parametrize("name", LINEARS)
def test_a_row_parallel_linear(name: str, kernels: Callable[[Group], Kernels], on_both: OnAll[Any]) -> None:
    scheme, columns, begin = LINEARS[name]
    source = torch.Generator().manual_seed(0)
    weight = torch.randn(48, columns, generator=source)
    bias, x, residual = torch.randn(48, generator=source), torch.randn(3, columns, generator=source), torch.ones(3, 48)
    # The largest of a token is one rank's.
    x[0, 5], x[1, -3], x[2, begin + 1] = 9.0, 9.0, -9.0
    post_norm = Norm(torch.rand(48, generator=source), 1e-5)
    whole = weight if scheme.dense else quantise(weight, scheme)
    alone = kernels(ALONE).linear("down", whole, bias)
    truth = [alone(x, residual=residual.clone()), alone(x, post_norm=post_norm, residual=residual.clone())]

    def compute(group: Group) -> list[Tensor]:
        run = slice(begin, columns) if group.rank else slice(0, begin)
        part = whole[:, run].contiguous() if isinstance(whole, Tensor) else whole.columns(run.start, run.stop)
        shard = Shard(1, run.start, columns, rounded_together(scheme, columns, begin))
        linear = kernels(group).linear("down", part, None if group.rank else bias, shard=shard)
        mine = x[:, run].contiguous()
        return [linear(mine, residual=residual.clone()), linear(mine, post_norm=post_norm, residual=residual.clone())]

    for found in on_both(compute):
        for one, expected in zip(found, truth, strict=True):
            assert (one - expected).abs().max() < 2e-4


def rounded_together(scheme: Scheme, columns: int, begin: int) -> int:
    group = scheme.group or columns
    return group if scheme.inputs and begin % group else 0


@pytest.mark.parametrize("kernels", [eager, fused])
def test_the_vocabulary_is_shared_out(kernels: Callable[[Group], Kernels], on_both: OnAll[Any]) -> None:
    source = torch.Generator().manual_seed(0)
    rows, norm = torch.randn(29, 32, generator=source), Norm(torch.rand(32, generator=source), 1e-5)
    padded = torch.cat([rows, torch.zeros(3, 32)])
    hidden, tokens = torch.randn(2, 32, generator=source), torch.tensor([0, 15, 16, 28, -1])
    if kernels is eager:
        tokens = tokens[:-1]
    truth = kernels(ALONE).head(rows, norm, tied=False, soft_cap=5.0).logits(hidden)

    def compute(group: Group) -> tuple[Tensor, Tensor]:
        shard, mine = Shard(0, 16 * group.rank, 29), padded[16 * group.rank :][:16].clone()
        head = kernels(group).head(mine, norm, tied=False, soft_cap=5.0, shard=shard)
        return kernels(group).embedding(mine, 0.5, shard)(step(tokens)), head.logits(hidden)

    for embedded, logits in on_both(compute):
        known = torch.where(tokens < 0, 17, tokens)  # the newest of its row
        assert torch.equal(embedded, rows[known] * 0.5)
        assert logits.shape == truth.shape
        assert logits.is_contiguous()
        assert (logits - truth).abs().max() < 1e-5


def step(tokens: Tensor) -> Any:
    """As much of a batch as an embedding looks at."""
    count = len(tokens)
    places = torch.arange(count, dtype=torch.int32)
    metadata = SimpleNamespace(last=torch.full((1,), 17, dtype=torch.int32), table=torch.zeros(1, 8, dtype=torch.int32))
    return SimpleNamespace(tokens=tokens, rows=0 * places, positions=places, slots=places, metadata=metadata)


@pytest.mark.parametrize("repeated", [False, True])
def test_a_norm_of_a_whole_projection(repeated: bool, on_both: OnAll[Any]) -> None:
    """The second rank's keys are its own, or those of the first."""
    source = torch.Generator().manual_seed(0)
    q, k, weights = torch.randn(3, 40, generator=source), torch.randn(3, 16, generator=source), torch.rand(56)
    pairs = zip((q, k), weights.split([40, 16]), strict=True)
    truth = [torch.nn.functional.rms_norm(x, x.shape[1:], weight, 1e-5) for x, weight in pairs]

    def compute(group: Group) -> tuple[slice, slice, Tensor]:
        queries = slice(24, 40) if group.rank else slice(0, 24)
        keys = slice(0, 16) if repeated else slice(8 * group.rank, 8 * group.rank + 8)
        x = torch.cat([q[:, queries], k[:, keys]], 1)
        count = queries.stop - queries.start
        norms = [
            ProjectionNorm(Norm(weights[:40][queries], 1e-5), slice(0, count), 40),
            ProjectionNorm(Norm(weights[40:][keys], 1e-5), slice(count, None), 16, repeated and group.rank == 1),
        ]
        eager(group).normalise_projections_(x, norms)
        return queries, keys, x

    for queries, keys, found in on_both(compute):
        assert (found - torch.cat([truth[0][:, queries], truth[1][:, keys]], 1)).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["w8a8", "fp8", "fp8_block"])
def test_rows_are_rounded_by_what_is_the_largest_elsewhere(name: str) -> None:
    scheme = SCHEMES[name]
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    x[1] = 0.0
    largest = torch.rand(3, scheme.groups(256)) * 5 + 4
    largest[1] = 0.0
    values, scales = quantised_inputs(x, scheme, largest=largest)
    found = quantise_rows(x, scheme, largest=largest)
    assert torch.equal(found.values.view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(found.scales.T, scales)
