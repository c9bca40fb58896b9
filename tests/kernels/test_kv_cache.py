"""The cache of all layers takes what its layout says, and no layer's slots are another's."""

from __future__ import annotations

import torch

from lightllmd.architecture.kv_layout import KvLayout, LayerKvLayout
from lightllmd.kernels.kv_cache import allocate


def test_layers_of_any_shape_share_a_block_of_the_planned_size() -> None:
    layout = KvLayout(
        (LayerKvLayout(2, 16, "float32"), LayerKvLayout(1, 64, "bfloat16"), LayerKvLayout(3, 16, "float16"))
    )
    caches = allocate(layout, 7, torch.device("cpu"))
    for number, (cache, layer) in enumerate(zip(caches, layout.layers, strict=True)):
        assert cache.entries.shape == (7, *layer.shape)
        assert cache.entries.dtype == getattr(torch, layer.dtype)
        cache.entries.fill_(number + 1)
    assert [cache.entries.unique().tolist() for cache in caches] == [[1], [2], [3]]
    assert caches[0].entries.untyped_storage().nbytes() == 7 * layout.slot_bytes


def test_what_was_stored_is_gathered_whatever_the_slots_are() -> None:
    [cache] = allocate(KvLayout((LayerKvLayout(2, 16, "float32"),)), 9, torch.device("cpu"))
    kv = torch.randn(3, 4, 16)
    cache.store(torch.tensor([4, 3, 5]), kv)
    for slots, expected in ((torch.tensor([5, 4]), kv[[2, 0]]), (slice(3, 6), kv[[1, 0, 2]])):
        keys, values = cache.gather(slots)
        assert torch.equal(keys, expected[:, :2])
        assert torch.equal(values, expected[:, 2:])
    cache.clear(4)
    assert not any(kept.any() for kept in cache.gather(slice(4, 5)))
