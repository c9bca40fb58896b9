"""What ranks load, put together, is what one loads, to the bit: dense, quantised, and cut inside groups."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from lightllmd.architecture.families import FAMILIES, architecture_of
from lightllmd.architecture.family import Architecture
from lightllmd.architecture.ranks import Rank, architecture_of_rank
from lightllmd.architecture.schemes import DENSE, SCHEMES, Scheme, scheme_of
from lightllmd.architecture.weight_schemes import WeightSchemes
from lightllmd.architecture.weights import Part, WeightSpec
from lightllmd.kernels.quantised import QuantisedMatrix, quantise
from lightllmd.weights import dummy, place, plain, staged
from lightllmd.weights.loaded import LoadedWeight
from lightllmd.weights.place import in_decoder_order
from lightllmd.weights.quantising import quantised
from lightllmd.weights.rank_parts import as_read, cut
from lightllmd.weights.safetensors import SafetensorsCheckpoint
from tiny_models import write_model

CPU = torch.device("cpu")
TIED = {"vocab_size": 131, "tie_word_embeddings": True}
INTERNLM2 = {"model_type": "internlm2", "num_attention_heads": 8, "num_key_value_heads": 2, "bias": True}
CHOICES = st.sampled_from([DENSE, *(scheme_of(name, 32) for name in SCHEMES if name != "dense")])


@st.composite
def models(draw: st.DrawFn) -> tuple[Architecture, int]:
    kv_heads = draw(st.integers(1, 5))
    heads = kv_heads * draw(st.integers(2, 4))
    pairs = draw(st.integers(1, 9))
    config = {
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 2 * pairs,
        "rope_scaling": {"rope_type": "default", "mrope_section": [pairs, 0, 0]},
        "intermediate_size": draw(st.integers(8, 200)),
        "vocab_size": draw(st.integers(1, 90)),
        "attention_bias": True,
        "mlp_bias": True,
        "bias": True,
        "tie_word_embeddings": draw(st.booleans()),
    }
    family = draw(st.sampled_from(sorted(FAMILIES)))
    return architecture_of(family, config), draw(st.integers(2, min(heads, 5)))


def load(weights: tuple[WeightSpec, ...], schemes: WeightSchemes) -> dict[str, LoadedWeight]:
    read = as_read(weights, schemes, (), columns=True)
    drawn = map(in_decoder_order, dummy.stream(read, torch.float32, CPU, lambda done, total: None))
    return {one.spec.key: one for one in cut(quantised(drawn, schemes, "test"), weights)}


def numbers(one: LoadedWeight) -> Tensor:
    return one.tensor if isinstance(one.tensor, Tensor) else one.tensor.dense(torch.float32)


def joined(whole: LoadedWeight, parts: list[LoadedWeight], ranks: list[Architecture]) -> Tensor:
    """The parts put together as the decoder has the whole: by what heads are whose."""
    role = whole.spec.role
    if role in ("attention_out", "down"):
        return torch.cat([numbers(part) for part in parts], 1)
    if role in ("embed", "head"):
        return torch.cat([numbers(part) for part in parts])[: whole.spec.parts[0].shape[0]]
    if role == "gate_up":
        sides = zip(*(numbers(part).chunk(2) for part in parts), strict=True)
        return torch.cat([half for side in sides for half in side])
    specs = [rank.spec.attention[0] for rank in ranks]
    kinds: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
    for spec, part in zip(specs, parts, strict=True):
        found = numbers(part)
        if role in ("q_norm", "k_norm"):
            named = {role[0]: found}
        else:
            named = dict(zip("qkv", found.split([spec.q_size, spec.kv_size, spec.kv_size]), strict=True))
        for kind, rows in named.items():
            if kind == "q" or not (spec.shared and spec.shared.repeats):
                kinds[kind].append(rows)
            else:
                assert torch.equal(rows, kinds[kind][-1])
    return torch.cat([rows for kind in kinds.values() for rows in kind])


@settings(max_examples=40, deadline=None)
@given(models(), CHOICES, st.sampled_from([17, 100, 1000, 1 << 20]))
def test_what_ranks_load_put_together_is_what_one_loads(
    model: tuple[Architecture, int], scheme: Scheme, chunk: int
) -> None:
    architecture, count = model
    schemes = WeightSchemes.all(scheme)
    ranks = [architecture_of_rank(architecture, schemes, Rank(index, count)) for index in range(count)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dummy, "CHUNK_ELEMENTS", chunk)  # inside a row, and several rows
        whole, parts = load(architecture.weights, schemes), [load(rank.weights, schemes) for rank in ranks]
    for key, one in whole.items():
        mine = [part[key] for part in parts]
        for rank, part in zip(ranks, mine, strict=True):
            planned = next(weight for weight in rank.weights if weight.key == key)
            scheme_here = DENSE if isinstance(part.tensor, Tensor) else part.tensor.scheme
            assert (part.tensor.shape, scheme_here) == (shape(planned), schemes.of(planned))
        if one.spec.shard_axis is None:
            assert all(torch.equal(numbers(part), numbers(one)) for part in mine)
        else:
            assert torch.equal(joined(one, mine, ranks), numbers(one))
        if one.bias is not None and one.spec.shard_axis == 1:
            assert [part.bias is None for part in mine] == [False, *[True] * (count - 1)]
            assert torch.equal(mine[0].bias, one.bias)
        elif one.bias is not None:
            as_weights = [part._replace(tensor=part.bias, bias=None) for part in mine]
            assert torch.equal(joined(one, as_weights, ranks), one.bias)


def shape(weight: WeightSpec) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in weight.parts), *weight.parts[0].shape[1:])


def test_a_dense_model_is_never_read_whole_and_rows_of_a_quantised_one_neither() -> None:
    architecture = architecture_of("llama", {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 256,
                                             "num_hidden_layers": 1, "vocab_size": 100})  # fmt: skip
    for name in SCHEMES:
        schemes = WeightSchemes.all(scheme_of(name, 32))
        mine = architecture_of_rank(architecture, schemes, Rank(1, 2)).weights
        whole = {weight.role for weight in as_read(mine, schemes, (), columns=True) if weight.whole is None}
        shared = {"attention_norm", "feed_forward_norm", "norm"}
        # Scales of a whole row, or of blocks that begin in another part, are made of what other ranks have.
        needed = {"fp8_block": {"qkv", "gate_up"}, "w4a16": set(), "dense": set()}.get(name, {"attention_out", "down"})
        assert whole - shared == needed


@pytest.mark.parametrize(
    "changes", [{"vocab_size": 131, "tie_word_embeddings": True}, INTERNLM2], ids=["llama", "internlm2"]
)
def test_both_ways_of_reading_files_read_the_parts(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read at a time: that of GPUs, too, which reads pieces beside each other."""
    folder = write_model(tmp_path, changes)
    config = json.loads((folder / "config.json").read_bytes())
    architecture = architecture_of(config["model_type"], config)
    whole = load_file(folder / "model.safetensors")
    mine = architecture_of_rank(architecture, WeightSchemes(), Rank(1, 3)).weights
    told: list[tuple[int, int]] = []
    for pieces, chunks in ((8 << 20, 16 << 20), (512, 640)):
        monkeypatch.setattr(staged, "PIECE_BYTES", pieces)
        monkeypatch.setattr(plain, "CHUNK_BYTES", chunks)
        checkpoint = SafetensorsCheckpoint([str(folder / "model.safetensors")])
        for stream in (place.stream, staged.stream):
            for spec, tensor, _ in stream(checkpoint, mine, torch.bfloat16, CPU, lambda *at: told.append(at)):
                rows = tensor.split([part.shape[0] for part in spec.parts])
                if spec.groups and stream is place.stream:
                    continue  # in the decoder's order, which the property above is of
                for part, found in zip(spec.parts, rows, strict=True):
                    assert torch.equal(found, expected(part, whole[part.name]).bfloat16())
            assert told[-1][0] == told[-1][1]


def expected(part: Part, whole: Tensor) -> Tensor:
    if part.cut is None:
        return whole
    held = torch.cat([whole.narrow(part.cut.axis, begin, end - begin) for begin, end in part.cut.runs], part.cut.axis)
    padding = part.shape[0] - len(held) if part.cut.axis == 0 else 0
    return torch.cat([held, held.new_zeros(padding, *held.shape[1:])])


@pytest.mark.parametrize(("group", "begin", "end"), [(32, 17, 90), (128, 0, 64), (128, 64, 200), (0, 30, 100)])
@pytest.mark.parametrize("zeros", [True, False])
def test_columns_in_an_order_of_their_own_are_cut(group: int, begin: int, end: int, zeros: bool) -> None:
    columns, draw = 200, torch.Generator().manual_seed(0)
    scheme = Scheme("w4a16", "uint4", "", group, 1, False) if zeros else Scheme("w8a16", "int8", "float32", group)
    order = torch.randperm(columns, generator=draw)
    weight = quantise(torch.randn(6, columns, generator=draw), scheme)
    ordered = Scheme(**{**scheme.__dict__, "ordered": True})
    matrix = QuantisedMatrix(ordered, weight.values, weight.scales, weight.zeros, order.int())
    part = matrix.columns(begin, end)
    x = torch.randn(3, end - begin, generator=draw, dtype=torch.float64)
    truth = x @ matrix.dense(torch.float64)[:, begin:end].T
    filled = torch.cat([x, x.new_zeros(3, 1)], 1).index_select(1, part.order)
    assert torch.allclose(filled @ part.unordered().dense(torch.float64).T, truth, atol=1e-6)
    assert part.shape[1] <= ordered.cut_columns(begin, end, columns)
    assert part.scheme.group == ordered.cut(begin).group
    assert part.scales.shape[1] == part.scheme.groups(part.shape[1])
    assert math.prod(part.values.shape) == part.values.untyped_storage().nbytes()
