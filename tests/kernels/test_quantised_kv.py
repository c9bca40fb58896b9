"""What is stored of keys and values is what the schemes' documentation says, to the bit, and is read as that."""

from __future__ import annotations

import pytest
import torch

import kv_reference
from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.architecture.kv_schemes import KV_SCHEMES, KvScheme
from lightllmd.kernels import kv_cache
from lightllmd.kernels.quantised_kv import dequantise, quantise

QUANTISED = [scheme for scheme in KV_SCHEMES.values() if not scheme.dense]
SCHEMES = pytest.mark.parametrize("scheme", QUANTISED, ids=lambda scheme: scheme.name)
CPU = torch.device("cpu")


@SCHEMES
@pytest.mark.parametrize("dim", [32, 96, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_stored_numbers_equal_the_reference_to_the_bit(scheme: KvScheme, dim: int, dtype: torch.dtype) -> None:
    kv = kv_reference.samples(40, 4, dim).to(dtype)
    before = kv.clone()
    values, scales = quantise(kv, scheme)
    expected, expected_scales = kv_reference.quantised(kv, scheme)
    assert torch.equal(scales, expected_scales)
    assert torch.equal(kv_reference.bytes_of(values), expected)
    assert torch.equal(kv, before), "it is left as it was"


@SCHEMES
def test_what_is_read_is_what_is_stored_rounded_once(scheme: KvScheme) -> None:
    kv = kv_reference.samples(40, 4, 64)
    stored = quantise(kv, scheme)
    expected = kv_reference.dequantised(kv_reference.bytes_of(stored[0]), stored[1], scheme)
    found = dequantise(*stored, scheme).double()
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=2e-7 * 3e5 if not scheme.symmetric else 0.0)


def test_every_code_of_a_scheme_is_read_as_it_stands() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 2, 32)
    for scheme in QUANTISED:
        scales = torch.rand(4, 2, scheme.scales(32 * scheme.packed)).half()
        expected = kv_reference.dequantised(codes, scales, scheme)
        found = dequantise(codes.view(getattr(torch, scheme.storage)), scales, scheme).double()
        known = ~expected.isnan()
        assert known.float().mean() > 0.98
        torch.testing.assert_close(found[known], expected[known], rtol=2e-7, atol=1e-6)


@SCHEMES
def test_a_cache_stores_gathers_and_clears_by_slot(scheme: KvScheme, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "AT_ONCE", 3 * 6 * 32)
    [_, cache] = kv_cache.allocate(
        KvLayout((LayerKvLayout(1, 32, "bfloat16", scheme), LayerKvLayout(3, 32, "float32", scheme))), 11, CPU
    )
    kv = torch.randn(8, 6, 32)
    slots = torch.tensor([4, 3, 5, 10, 0, 7, 8, 9])
    cache.store(slots, kv)
    read = dequantise(*quantise(kv, scheme), scheme)
    for wanted, expected in (
        (torch.tensor([5, 4, 4, 0, 10]), read[[2, 0, 0, 4, 3]]),
        (slice(7, 11), read[[5, 6, 7, 3]]),
        (slice(5, 5), read[:0]),
    ):
        keys, values = cache.gather(wanted)
        assert keys.dtype == torch.float32
        assert torch.equal(keys, expected[:, :3])
        assert torch.equal(values, expected[:, 3:])
    cache.clear(4)
    assert not any(kept.any() for kept in cache.gather(slice(4, 5)))


@SCHEMES
def test_layers_of_any_shape_share_a_block_of_the_planned_size(scheme: KvScheme) -> None:
    layout = KvLayout(tuple(LayerKvLayout(heads, dim, "float16", scheme) for heads, dim in ((1, 32), (2, 64), (3, 32))))
    caches = kv_cache.allocate(layout, 7, CPU)
    tensors = [tensor for cache in caches for tensor in cache.tensors]
    for number, tensor in enumerate(tensors):
        tensor.view(torch.uint8).fill_(number)
        assert tensor.data_ptr() % 16 == tensors[0].data_ptr() % 16, "loads of 128 bits"
    assert [tensor.view(torch.uint8).unique().tolist() for tensor in tensors] == [[n] for n in range(len(tensors))]
    assert sum(tensor.nbytes for tensor in tensors) == 7 * layout.slot_bytes
    padding = tensors[0].untyped_storage().nbytes() - 7 * layout.slot_bytes
    assert 0 <= padding < 16 * len(caches)
