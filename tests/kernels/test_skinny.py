"""Products of few rows equal the reference, whatever is fused into them and however their work is cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import covering
from lightllmd.kernels import reference, tiles
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.skinny import linear
from lightllmd.kernels.tiles import Tile

# Small blocks, so that a few hundred columns take several programs and several rounds.
GEMV = Tile(True, 4, 64, 4, 1)
GEMV_PIPELINED = Tile(True, 2, 64, 4, 3)
DOT = Tile(False, 16, 64, 4, 3)
DOT_WIDE = Tile(False, 32, 32, 4, 4)
RELATIVE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def random(shape: tuple[int, ...], device: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def close(ours: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    scale = max(1.0, float(truth.float().abs().max()))
    torch.testing.assert_close(ours.float(), truth.float(), rtol=RELATIVE[dtype], atol=RELATIVE[dtype] * scale / 4)


def check(
    tile: Tile,
    m: int,
    n: int,
    k: int,
    device: str,
    dtype: torch.dtype,
    *,
    norm: float | None = None,
    bias: bool = False,
    residual: bool = False,
    activation: str | None = None,
    wide: bool = False,
) -> None:
    """One product against the reference; x and out are slices, what lies beside them is NaN and stays NaN."""
    nan = float("nan")
    made = n // 2 if activation else n
    x = torch.full((m, k + 16), nan, device=device, dtype=dtype)[:, :k]
    x.copy_(random((m, k), device, dtype, 0) * 2)
    weight = random((n, k), device, dtype, 1) / k**0.5
    weights = None if norm is None else random((k,), device, dtype, 2)
    biases = random((n,), device, dtype, 3) if bias else None
    around = torch.full((m + 1, made + 16), nan, device=device, dtype=torch.float32 if wide else dtype)
    out = around[:m, :made]
    if residual:
        out.copy_(random((m, made), device, out.dtype, 4))
    normed = x if weights is None else reference.rms_norm(x.float(), weights.float(), 1e-5, norm or 0.0)
    truth = normed.float() @ weight.float().T
    if biases is not None:
        truth += biases.float()
    if activation:
        truth = reference.gated(truth, activation)
    if residual:
        truth += out.float()
    linear(
        x,
        weight,
        out,
        norm=None if weights is None else Norm(weights, 1e-5, norm),
        bias=biases,
        residual=out if residual else None,
        activation=activation,
        tile=tile,
    )
    close(out, truth, torch.float32 if wide and dtype is torch.float32 else dtype)
    assert around[m:].isnan().all()
    assert around[:, made:].isnan().all()


@pytest.mark.parametrize("tile", [GEMV, GEMV_PIPELINED])
@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_gemv_with_ragged_shapes(tile: Tile, m: int, device: str, dtypes: torch.dtype) -> None:
    check(tile, m, 37, 193, device, dtypes, norm=float(m % 2))
    check(tile, m, 40, 64, device, dtypes, bias=True)


@pytest.mark.parametrize("tile", [DOT, DOT_WIDE])
@pytest.mark.parametrize("m", [1, 5, 16, 17, 33, 64, 100])
def test_dot_with_ragged_shapes(tile: Tile, m: int, device: str, dtypes: torch.dtype) -> None:
    check(tile, m, 37, 193, device, dtypes)
    check(tile, m, 48, 128, device, dtypes, bias=True, residual=True)


def test_rows_beyond_one_block(device: str, dtypes: torch.dtype) -> None:
    check(DOT, 2 * tiles.BLOCK_ROWS + 3, 20, 96, device, dtypes, bias=True)


@covering(1, tile=[GEMV, DOT, DOT_WIDE, GEMV_PIPELINED], activation=sorted(reference.ACTIVATIONS))
def test_activation_of_both_halves(tile: Tile, activation: str, device: str, dtypes: torch.dtype) -> None:
    m = 3 if tile.gemv else 18
    check(tile, m, 52, 128, device, dtypes, activation=activation, norm=0.0 if tile.gemv else None, bias=True)


@pytest.mark.parametrize("tile", [GEMV, DOT, DOT_WIDE])
def test_residual_stream_is_updated_in_place(tile: Tile, device: str, every_dtype: torch.dtype) -> None:
    check(tile, 2, 52, 130, device, every_dtype, residual=True)


@pytest.mark.parametrize("tile", [GEMV, DOT, DOT_WIDE])
def test_logits_are_written_in_fp32(tile: Tile, device: str, every_dtype: torch.dtype) -> None:
    check(tile, 3, 90, 64, device, every_dtype, wide=True, norm=1.0 if tile.gemv else None)


def test_gemv_in_fp16_takes_a_large_residual_stream(device: str) -> None:
    """x * norm alone is beyond fp16's 65504."""
    x = random((1, 256), device, torch.float16, 0) * 1e4
    norm = torch.full((256,), 30.0, device=device, dtype=torch.float16)
    weight = random((24, 256), device, torch.float16, 1) / 16
    out = torch.full((1, 24), float("nan"), device=device, dtype=torch.float16)
    linear(x, weight, out, norm=Norm(norm, 1e-5), tile=GEMV)
    truth = reference.rms_norm(x.float(), norm.float(), 1e-5) @ weight.float().T
    close(out, truth, torch.float16)


@pytest.mark.parametrize("tile", [DOT, DOT_WIDE])
def test_a_row_does_not_depend_on_the_rows_beside_it(tile: Tile, device: str, dtypes: torch.dtype) -> None:
    x, weight = random((9, 128), device, dtypes, 0), random((40, 128), device, dtypes, 1)
    full = torch.empty(9, 40, device=device, dtype=dtypes)
    alone = torch.empty(2, 40, device=device, dtype=dtypes)
    linear(x, weight, full, tile=tile)
    linear(x[3:5], weight, alone, tile=tile)
    assert torch.equal(full[3:5], alone)


SHAPES = [
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (128256, 4096)),
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (151936, 1024)),
    *((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576), (37, 50)),
]


def test_rules_give_a_tile_that_fits_to_every_shape() -> None:
    rows = (*range(1, 66), 100, 128, 256, 257, 5000)
    for m, (n, k), gated in itertools.product(rows, SHAPES, (False, True)):
        tile = tiles.tile_for(m, n, k, torch.bfloat16, gated)
        assert tile.block_n == tiles.power_above(tile.block_n)
        assert tile.block_k == tiles.power_above(tile.block_k)
        assert not gated or tile.block_n > 1, "gate and up of a column belong to one program"
        if tile.gemv:
            assert m <= tiles.GEMV_ROWS
        else:
            staged = (tiles.block_rows(m) + tile.block_n) * tile.block_k * 2 * tile.stages
            assert staged <= 227 * 1024, "shared memory of an H100's multiprocessor"


def test_fp32_is_left_to_the_caller() -> None:
    assert not tiles.supports(torch.float32)
    assert not tiles.prefers(1, 4096, 4096, torch.float32, False)
    assert tiles.prefers(1, 4096, 4096, torch.bfloat16, False)


def test_all_products_of_an_8b_model_are_ours_up_to_32_rows() -> None:
    qkv, o, gate_up, down, head = SHAPES[:5]

    def ours(m: int) -> set[tuple[int, int]]:
        return {shape for shape in SHAPES[:5] if tiles.prefers(m, *shape, torch.bfloat16, shape is gate_up)}

    assert all(ours(m) == {qkv, o, gate_up, down, head} for m in range(1, 33))
    assert all(ours(m) == {gate_up, down, head} for m in range(33, 65))
    assert all(ours(m) == {gate_up, head} for m in range(65, 129))
    assert not ours(129)


@pytest.mark.parametrize("m", [1, 3, 8, 40])
def test_rules_as_they_are(m: int, device: str) -> None:
    """The whole way with the tile that the rules choose, on a shape whose K is no multiple of most blocks."""
    n, k = 192, 576
    tile = tiles.tile_for(m, n, k, torch.float16, True)
    check(
        tile,
        m,
        n,
        k,
        device,
        torch.float16,
        norm=0.0 if tiles.fuses_norm(m, torch.float16) else None,
        activation="silu",
    )


def test_tiles_measured_on_a_card_come_before_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, dtype = 4096, 4096, torch.bfloat16
    monkeypatch.setitem(tiles.TUNED, "measured", {(False, n, k): [(2, DOT), (16, None)]})
    assert tiles.tile_for(2, n, k, dtype, False, "measured") == DOT
    assert [tiles.prefers(m, n, k, dtype, False, "measured") for m in (1, 2, 3, 16, 17, 64)] == [1, 1, 0, 0, 1, 0]
    assert tiles.tile_for(17, n, k, dtype, False, "measured") == tiles.tile_for(17, n, k, dtype, False)
    assert tiles.tile_for(2, n, 2 * k, dtype, False, "measured") == tiles.tile_for(2, n, 2 * k, dtype, False)
