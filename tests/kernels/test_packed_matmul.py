"""Matmuls with packed weights of 4 and 8 bits equal those with the numbers that the weights stand for, whatever is
fused into them and however their work is cut."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from covering import covering
from lightllmd.architecture import gpu_storage
from lightllmd.architecture.schemes import SCHEMES, Scheme
from lightllmd.kernels import reference
from lightllmd.kernels.cards import H100, H200, Card
from lightllmd.kernels.fused import FusedKernels
from lightllmd.kernels.linear import Norm
from lightllmd.kernels.packed import layout as packing
from lightllmd.kernels.packed import tiles as packed_tiles
from lightllmd.kernels.packed.dense import dense
from lightllmd.kernels.packed.linear import FusedPackedLinear
from lightllmd.kernels.packed.matmul import PackedWeight, multiply
from lightllmd.kernels.packed.tiles import PackedTile
from lightllmd.kernels.quantised import QuantisedMatrix, quantise

W4, W8 = SCHEMES["w4a16"], SCHEMES["w8a16"]
SCHEMES_OF_4 = [W4, *(replace(W4, group=group) for group in (0, 16, 32, 64, 96, 256))]
SCHEMES_OF_8 = [W8, replace(W8, group=128), replace(W8, group=32)]
WITH_ZEROS = replace(W8, values="uint8", group=64, symmetric=False)
# Small blocks, so that a few hundred columns take several programs and several rounds.
SKINNY = PackedTile("skinny", 8, 32, 4, 1, 2)
SUBTRACTING = PackedTile("skinny", 32, 16, 2, 1, 2)  # zeros are subtracted from values
WIDE = PackedTile("wide", 16, 32, 4, 1, 2)
SPLIT = PackedTile("wide", 16, 32, 4, 1, 2, splits=3)
GEMV = PackedTile("gemv", 1, 32, 2, 1, 1)
DTYPE = torch.float16  # the interpreter computes bf16 wrongly


def random(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, DTYPE)


def quantised(rows: int, columns: int, scheme: Scheme, device: str) -> QuantisedMatrix:
    """With zeros that differ by row and group: rows don't have their mean at 0."""
    weight = random(rows, columns, device=device, seed=1) / columns**0.5
    return quantise(weight + torch.linspace(-0.1, 0.1, rows, device=device)[:, None].to(DTYPE), scheme)


def packed(weight: QuantisedMatrix) -> PackedWeight:
    bits = 4 if weight.scheme.values == "uint4" else 8
    zero = None if weight.zeros is None else weight.zeros.t().contiguous()
    group = weight.scheme.group if weight.scheme.group < weight.shape[1] else 0
    return PackedWeight(
        packing.pack(weight.values, bits), weight.scales.t().contiguous(), zero, *weight.shape, bits, group
    )


def close(ours: Tensor, truth: Tensor) -> None:
    scale = max(1.0, float(truth.abs().max()))
    torch.testing.assert_close(ours.float(), truth, rtol=2e-3, atol=5e-4 * scale)


def check(tile: PackedTile, m: int, n: int, k: int, scheme: Scheme, device: str, **fused: Any) -> None:
    """One product against the reference; x and out are slices, what lies beside them is NaN and stays NaN."""
    nan = float("nan")
    made = n // 2 if "activation" in fused else n
    x = torch.full((m, k + 16), nan, device=device, dtype=DTYPE)[:, :k]
    x.copy_(random(m, k, device=device) * 2)
    weight = quantised(n, k, scheme, device)
    around = torch.full((m + 1, made + 16), nan, device=device, dtype=DTYPE)
    out = around[:m, :made]
    bias = random(n, device=device, seed=3) if fused.pop("bias", False) else None
    residual = out if fused.pop("residual", False) else None
    norm = Norm(random(k, device=device, seed=2), 1e-5) if fused.pop("norm", False) else None
    if residual is not None:
        out.copy_(random(m, made, device=device, seed=4))
    normed = x.float() if norm is None else reference.rms_norm(x.float(), norm.weight.float(), norm.eps)
    truth = normed @ weight.dense(torch.float32).T
    truth += 0 if bias is None else bias.float()
    if "activation" in fused:
        truth = reference.gated(truth, fused["activation"])
    truth += 0 if residual is None else residual.float()
    arrived = torch.zeros(64, dtype=torch.int32, device=device)
    multiply(x, packed(weight), out, tile, arrived, norm, bias, residual, **fused)
    close(out, truth)
    assert around[m:].isnan().all()
    assert around[:, made:].isnan().all()
    assert not arrived.any(), "as the next launch expects it"


@pytest.mark.parametrize("columns", [64, 192])
@pytest.mark.parametrize("rows", [5, 16, 48, 50, 1040])
def test_what_is_packed_can_be_unpacked(rows: int, columns: int) -> None:
    values = torch.randint(0, 16, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    wide = values.view(torch.int8) - 8
    for given, bits in ((values, 4), (wide, 8), (values * 17, 8)):
        stored = packing.pack(given, bits)
        assert stored.nbytes == rows * columns * bits // 8
        assert torch.equal(packing.unpack(stored, rows, columns, bits), given)


def test_a_block_lies_as_it_is_documented() -> None:
    """Row 17 of 20, inputs 64 to 127: the second block of the last four rows."""
    values = torch.randint(0, 16, (20, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    words = packing.pack(values, 4)[16 * 128 // 4 + 4 * 16 + 16 :][:16].to(torch.int32)
    for plane in range(4):
        assert torch.equal(words >> 4 * plane & 15, values[17, 64 + 16 * plane :][:16].to(torch.int32))


@covering(2, tile=[SKINNY, SUBTRACTING, WIDE, SPLIT], scheme=[*SCHEMES_OF_4, *SCHEMES_OF_8, WITH_ZEROS], m=[1, 7, 20])
def test_every_group_with_ragged_shapes(tile: PackedTile, scheme: Scheme, m: int, device: str) -> None:
    check(tile, m, 37, 320, scheme, device)


@covering(1, scheme=[W4, replace(W4, group=64), replace(W4, group=0), W8, replace(W8, group=128), WITH_ZEROS], m=[1, 4])
def test_few_rows_as_whole_numbers(scheme: Scheme, m: int, device: str) -> None:
    """With units that are no multiple of what the slices have, rows that no program has a whole tile of, and the norm,
    bias, residual and activation that a decoder fuses."""
    check(GEMV, m, 48, 320, scheme, device, norm=True, bias=True)
    check(GEMV._replace(block_n=16), m, 48, 320, scheme, device, residual=True)
    check(GEMV, m, 96, 320, scheme, device, activation="silu", norm=True)


@pytest.mark.parametrize("scheme", [W4, W8], ids=["w4a16", "w8a16"])
def test_units_of_two_blocks_and_inputs_of_very_different_sizes(scheme: Scheme, device: str) -> None:
    """An input of one unit that is 10,000 times the others takes nothing from those of other units."""
    x, weight = random(2, 640, device=device), quantised(32, 640, scheme, device)
    x[0, 130], x[1, 5] = 3e4, -2e4
    out = torch.empty(2, 32, device=device, dtype=DTYPE)
    multiply(x, packed(weight), out, GEMV._replace(blocks=2), torch.zeros(1, dtype=torch.int32, device=device))
    dense = weight.dense(torch.float32)
    close(out, x.float() @ dense.T)
    x[0, 130], x[1, 5] = 0.0, 0.0
    small = torch.empty_like(out)
    multiply(x, packed(weight), small, GEMV._replace(blocks=2), torch.zeros(1, dtype=torch.int32, device=device))
    close(small, x.float() @ dense.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_is_no_number_is_none_in_the_result(value: float, device: str) -> None:
    """A row of x alone: the one beside it is whole."""
    x = random(2, 320, device=device)
    x[1, 200] = value
    out = torch.zeros(2, 32, device=device, dtype=DTYPE)
    weight = packed(quantised(32, 320, W4, device))
    multiply(x, weight, out, GEMV, torch.zeros(1, dtype=torch.int32, device=device))
    assert bool(out[0].isfinite().all())
    assert bool(out[1].isnan().all())


@covering(1, tile=[SKINNY, SUBTRACTING, WIDE, SPLIT], scheme=[W4, W8])
def test_steps_of_two_blocks(tile: PackedTile, scheme: Scheme, device: str) -> None:
    check(tile._replace(blocks=2), 3, 32, 576, scheme, device)


@covering(1, tile=[SKINNY, SUBTRACTING, WIDE, SPLIT], scheme=[W4, W8], bias=[True, False])
def test_residual_stream_is_updated_in_place(tile: PackedTile, scheme: Scheme, bias: bool, device: str) -> None:
    check(tile, 10, 48, 256, scheme, device, bias=bias, residual=True)


@covering(1, tile=[SKINNY, WIDE, SPLIT], scheme=[W4, W8], activation=["silu", "gelu_tanh"])
def test_activation_of_both_halves(tile: PackedTile, scheme: Scheme, activation: str, device: str) -> None:
    check(tile, 3, 52, 192, scheme, device, activation=activation, bias=True)


@pytest.mark.parametrize("scheme", [W4, W8], ids=["4 bits", "8 bits"])
def test_norm_of_one_row(scheme: Scheme, device: str) -> None:
    check(SKINNY, 1, 48, 320, scheme, device, norm=True, activation="silu")


def test_a_row_does_not_depend_on_the_rows_beside_it(device: str) -> None:
    x, weight = random(9, 256, device=device), packed(quantised(40, 256, W4, device))
    arrived = torch.zeros(64, dtype=torch.int32, device=device)
    for tile in (SKINNY, WIDE):
        full, alone = x.new_empty(9, 40), x.new_empty(2, 40)
        multiply(x, weight, full, tile, arrived)
        multiply(x[3:5], weight, alone, tile, arrived)
        assert torch.equal(full[3:5], alone)


@pytest.mark.parametrize("scheme", [W4, replace(W4, group=16), W8, replace(W8, group=32), WITH_ZEROS], ids=str)
def test_rows_made_dense_are_those_of_the_scheme(scheme: Scheme, device: str) -> None:
    weight = quantised(84, 320, scheme, device)
    stored, out = packed(weight), torch.full((37, 320), float("nan"), device=device, dtype=DTYPE)
    dense(stored.values, stored.scale, stored.zero, out[:36], 48, 84, stored.bits, stored.group)
    assert torch.equal(out[:36], weight.dense(DTYPE)[48:])
    assert out[36].isnan().all()


# --- the linear ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dense_rows", [0, 512], ids=["made dense", "packed"])
@pytest.mark.parametrize(
    "scheme", [W4, replace(W4, group=32, ordered=True), W8, replace(WITH_ZEROS, ordered=True)], ids=str
)
def test_whatever_stands_around_the_matmul_is_what_it_would_be_apart(
    scheme: Scheme, dense_rows: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_tiles, "DENSE_ROWS", dense_rows)
    monkeypatch.setattr(gpu_storage, "dense_rows", lambda rows, columns, item_bytes: 32)
    packed_tiles.tile_for.cache_clear()
    weight = quantised(48, 192, scheme, device)
    if scheme.ordered:
        order = torch.randperm(192, generator=torch.Generator().manual_seed(5)).to(device, torch.int32)
        weight = replace(weight, order=order)
    x, residual = random(3, 192, device=device), random(3, 48, device=device, seed=6)
    bias, given = random(48, device=device, seed=7), x.clone()
    norm, post_norm = (Norm(random(size, device=device, seed=8), 1e-5, 1.0) for size in (192, 48))
    linear = FusedKernels(torch.device(device)).linear("qkv", weight, bias)
    truth = weight.dense(torch.float32)
    assert isinstance(linear, FusedPackedLinear)
    plain = reference.linear(x.float(), truth, bias.float())
    normed = reference.linear(reference.rms_norm(x.float(), norm.weight.float(), 1e-5, 1.0), truth, bias.float())
    behind = reference.rms_norm(plain, post_norm.weight.float(), 1e-5, 1.0)
    close(linear(x), plain)
    torch.testing.assert_close(linear(x, norm=norm).float(), normed, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        linear(x, norm=norm, activation="silu").float(), reference.gated(normed, "silu"), rtol=1e-2, atol=2e-2
    )
    close(linear(x, residual=residual.clone()), plain + residual.float())
    torch.testing.assert_close(
        linear(x, post_norm=post_norm, residual=residual.clone()).float(),
        behind + residual.float(),
        rtol=1e-2,
        atol=1e-2,
    )
    assert torch.equal(x, given)
    packed_tiles.tile_for.cache_clear()


def test_a_linear_of_fp32_is_exact(device: str) -> None:
    weight = quantise(torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).to(device), W4)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)).to(device)
    linear = FusedKernels(torch.device(device)).linear("o", weight, None)
    torch.testing.assert_close(linear(x), x @ weight.dense(torch.float32).T, rtol=1e-5, atol=1e-5)


def test_what_lies_on_the_device_may_be_freed_and_filled_again_in_place(device: str) -> None:
    linear = FusedKernels(torch.device(device)).linear("down", quantised(48, 192, W4, device), None)
    x, stored = random(3, 192, device=device), linear.tensors()
    before = linear(x)
    assert sum(tensor.nbytes for tensor in stored.values()) == W4.nbytes((48, 192), 2)
    copies = {name: tensor.clone() for name, tensor in stored.items()}
    for tensor in stored.values():
        tensor.untyped_storage().resize_(0)
    for name, tensor in stored.items():
        tensor.untyped_storage().resize_(copies[name].nbytes)
        tensor.copy_(copies[name])
    assert torch.equal(linear(x), before)


def test_a_matmul_takes_no_more_than_planned() -> None:
    """Of the shapes of an 8B model, in bytes: what is made dense, and what programs that share inputs add up."""
    for (n, k), scheme in itertools.product(SHAPES[:4], (W4, W8)):
        planned = gpu_storage.scratch_nbytes(scheme, (n, k), 2)
        assert planned >= gpu_storage.dense_rows(n, k, 2) * k * 2
        assert planned < 80 << 20
        for card, m in itertools.product((H100, H200), (33, 64, 128, 256, 512)):
            tile = packed_tiles.tile_for(card, m, n, k, 4 if scheme is W4 else 8, scheme.group, False)
            if tile is None:
                assert m > 128
                assert scheme is W4, "measured"
                assert card is H200
                continue
            programs = -(-n // tile.block_n) * -(-m // tile.block_m) * tile.splits
            assert tile.splits == 1 or programs * tile.block_n * tile.block_m * 4 <= gpu_storage.SHARED_SUMS


# --- the rules ----------------------------------------------------------------------------------------------------

SHAPES = [
    *((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (10240, 8192), (57344, 8192), (8192, 28672)),
    *((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (960, 576), (576, 576), (3072, 576), (576, 1536)),
]
SMALL = Card("other", 46, 1e12, 4 << 20, 99 << 10, False)


@pytest.mark.parametrize("card", [H100, H200, SMALL], ids=lambda card: card.kind)
def test_rules_give_a_tile_that_fits_to_every_shape(card: Card) -> None:
    rows = (*range(1, 66), 100, 128, 256, 512, 513, 5000)
    for m, (n, k), (bits, group), gated in itertools.product(rows, SHAPES, ((4, 128), (4, 32), (8, 0)), (False, True)):
        tile = packed_tiles.tile_for(card, m, n, k, bits, group, gated)
        measured = (bits, gated, n, k) in packed_tiles.TUNED.get(card.kind, {})
        assert tile is None if m > packed_tiles.DENSE_ROWS else tile is not None or (measured and m > 128)
        if tile is not None:
            assert packed_tiles.staged(tile, bits) <= card.shared, (m, n, k, tile)
            assert tile.way != "skinny" or tile.block_m >= m
            assert group == 0 or group % (64 * tile.blocks) == 0 or tile.blocks == 1
            assert tile.way != "wide" or tile.block_n >= 64, "a warp group's rows"


def test_measured_tiles_come_before_derived_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: packed_tiles.Measured = {
        (4, False, 4096, 4096): [(4, SKINNY), (64, WIDE._replace(blocks=2)), (128, None)]
    }
    monkeypatch.setitem(packed_tiles.TUNED, "H200", measured)
    card = replace(H200, cache=1)  # one that no other test has asked for
    asked = {m: packed_tiles.tile_for(card, m, 4096, 4096, 4, 64, False) for m in (1, 4, 5, 65, 200)}
    assert asked[1] == asked[4] == SKINNY
    assert asked[5] == WIDE, "a step has the inputs of one group"
    assert asked[65] is None
    assert asked[200] is not None
