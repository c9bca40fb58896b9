"""Quantised checkpoints as the documentation of their formats has them, written bit by bit with numpy, and the dense
model that each stands for. Nothing of what loads them is used."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from lightllmd.config.plan import Plan
from lightllmd.probe.model import model_facts
from model_folders import TOKENIZER
from tiny_models import BASE, plan_for, tensors_of, write_model, write_tensors

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Stored = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """What stands for a matrix ``[N, K]``."""

    tensors: Stored  # by the end of their names
    dense: np.ndarray  # float64
    rounds: Callable[[Tensor], Tensor] | None = None  # what inputs are rounded to before they are multiplied with it


Writer = Callable[[np.ndarray, np.random.Generator], Written]


def groups_of(columns: int, size: int) -> np.ndarray:
    """The group of each input, in order."""
    return np.arange(columns) // (size if size > 0 else columns)


def integers(
    weight: np.ndarray, groups: np.ndarray, bits: int, symmetric: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """-> values ``[N, K]`` from 0, scales ``[G, N]`` in fp16, zeros ``[G, N]``."""
    count, top = groups.max() + 1, 2**bits - 1
    values = np.zeros(weight.shape, np.int64)
    scales, zeros = np.zeros((count, len(weight)), np.float16), np.zeros((count, len(weight)), np.int64)
    for group in range(count):
        part = weight[:, groups == group]
        if symmetric:
            scales[group] = np.abs(part).max(1) * 2 / top
            zeros[group] = (top + 1) // 2
        else:
            low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
            scales[group] = (high - low) / top
            zeros[group] = np.rint(-low / scales[group].astype(np.float64))
        exact = scales[group].astype(np.float64)[:, None]
        values[:, groups == group] = np.clip(np.rint(part / exact) + zeros[group][:, None], 0, top)
    return values, scales, zeros


def dense_of(values: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """``(value - zero) * scale``, of each input's group."""
    return (values - zeros[groups].T) * scales.astype(np.float64)[groups].T


def packed(rows: np.ndarray, bits: int, places: list[int] | None = None) -> np.ndarray:
    """``[R, C]`` -> ``[R, ceil(C bits / 32)]`` int32; `places`: which of a word's columns is at each place, from the
    lowest bits on."""
    per_word = 32 // bits
    places = places or list(range(per_word))
    padded = np.pad(rows.astype(np.int64), ((0, 0), (0, -rows.shape[1] % per_word)))
    words = np.zeros((len(rows), padded.shape[1] // per_word), np.uint64)
    for at, place in enumerate(places):
        words |= padded[:, place::per_word].astype(np.uint64) << np.uint64(at * bits)
    return words.astype(np.uint32).view(np.int32)


def tensor(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(numbers))


# --- formats ------------------------------------------------------------------------------------------------------


def gptq(
    bits: int = 4, size: int = 32, symmetric: bool = True, less_one: bool = True, shuffled: bool = False
) -> Writer:
    def write(weight: np.ndarray, draw: np.random.Generator) -> Written:
        groups = groups_of(weight.shape[1], size)
        if shuffled:
            groups = groups[np.random.default_rng(weight.shape[1]).permutation(len(groups))]
        values, scales, zeros = integers(weight, groups, bits, symmetric)
        stored = {
            "qweight": tensor(packed(values, bits).T),
            "qzeros": tensor(packed(zeros - 1 if less_one else zeros, bits)),
            "scales": tensor(scales),
            "g_idx": tensor(groups.astype(np.int32)),
        }
        return Written(stored, dense_of(values, scales, zeros, groups))

    return write


def awq(size: int = 32) -> Writer:
    def write(weight: np.ndarray, draw: np.random.Generator) -> Written:
        groups, order = groups_of(weight.shape[1], size), [0, 2, 4, 6, 1, 3, 5, 7]
        values, scales, zeros = integers(weight, groups, 4, False)
        stored = {
            "qweight": tensor(packed(values.T, 4, order)),
            "qzeros": tensor(packed(zeros, 4, order)),
            "scales": tensor(scales),
        }
        return Written(stored, dense_of(values, scales, zeros, groups))

    return write


def pack_quantized(bits: int = 4, size: int = 32, symmetric: bool = True, shuffled: bool = False) -> Writer:
    def write(weight: np.ndarray, draw: np.random.Generator) -> Written:
        groups = groups_of(weight.shape[1], size)
        if shuffled:
            groups = groups[np.random.default_rng(weight.shape[1]).permutation(len(groups))]
        values, scales, zeros = integers(weight, groups, bits, symmetric)
        stored = {
            "weight_packed": tensor(packed(values, bits)),
            "weight_scale": tensor(scales.T),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            stored["weight_zero_point"] = tensor(packed(zeros, bits).T)
        if shuffled:
            stored["weight_g_idx"] = tensor(groups.astype(np.int32))
        return Written(stored, dense_of(values, scales, zeros, groups))

    return write


def int_quantized(whole: bool = False, symmetric: bool = True, inputs: str = "dynamic", spread: bool = False) -> Writer:
    """`inputs`: "dynamic", "static" or "" for none. `whole`: one scale for the tensor."""

    def write(weight: np.ndarray, draw: np.random.Generator) -> Written:
        values, scales, zeros = integers(weight, groups_of(weight.shape[1], -1), 8, symmetric)
        if whole:
            scales = np.full_like(scales, np.abs(weight).max() * 2 / 255)
            values = np.clip(np.rint(weight / scales.astype(np.float64).T) + 128, 0, 255).astype(np.int64)
        stored = {
            "weight": tensor((values - 128).astype(np.int8)),
            "weight_scale": tensor(scales[0, :1] if whole else scales.T),
        }
        if not symmetric:
            stored["weight_zero_point"] = tensor((zeros - 128).astype(np.int8).T)
        if inputs == "static":
            stored["input_scale"] = torch.tensor([0.03])
        dense = dense_of(values, scales, zeros, groups_of(weight.shape[1], -1))
        return Written(stored, dense, {"": None, "static": fixed_int8, "dynamic": token_int8}[inputs])

    return write


def float_quantized(
    kind: str = "channel",
    inputs: str = "dynamic",
    block: tuple[int, int] = (128, 128),
    scale: str = "weight_scale",
    input_scale: str = "input_scale",
) -> Writer:
    """`kind`: "tensor", "channel" or "block"."""

    def write(weight: np.ndarray, draw: np.random.Generator) -> Written:
        rows, columns = weight.shape
        high, wide = {"tensor": (rows, columns), "channel": (1, columns), "block": block}[kind]
        scales = np.zeros((-(-rows // high), -(-columns // wide)), np.float32)
        for down in range(scales.shape[0]):
            for right in range(scales.shape[1]):
                part = weight[down * high : (down + 1) * high, right * wide : (right + 1) * wide]
                scales[down, right] = np.abs(part).max() / 448
        spread = scales.repeat(high, 0)[:rows].repeat(wide, 1)[:, :columns].astype(np.float64)
        values = torch.from_numpy(weight / spread).float().clamp(-448, 448).to(torch.float8_e4m3fn)
        stored = {"weight": values, scale: tensor(scales)}
        if kind == "tensor":
            stored[scale] = tensor(scales).reshape(())
        if inputs == "static":
            stored[input_scale] = torch.tensor(0.01)
        rounds = {"": None, "static": fixed_float8, "dynamic": token_float8}[inputs]
        if kind == "block" and inputs:
            rounds = lambda x: blocks_float8(x, wide)  # noqa: E731
        return Written(stored, values.float().numpy().astype(np.float64) * spread, rounds)

    return write


# --- inputs -------------------------------------------------------------------------------------------------------


def token_int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def fixed_int8(x: Tensor) -> Tensor:
    return (x / 0.03).round().clamp(-128, 127) * 0.03


def token_float8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def fixed_float8(x: Tensor) -> Tensor:
    return (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 0.01


def blocks_float8(x: Tensor, wide: int) -> Tensor:
    return torch.cat([token_float8(part) for part in x.split(wide, -1)], -1)


# --- folders ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A checkpoint: its settings, and who writes its matrices."""

    settings: dict[str, Any]
    writer: Writer
    others: dict[str, Writer | None] = field(default_factory=dict)  # of modules whose names end so; None: as they are
    changes: dict[str, Any] = field(default_factory=dict)  # of config.json
    file: str = ""  # that the settings are in; unset: config.json


def write_quantised(folder: Path, case: Case, shards: int = 1) -> tuple[Path, Path, dict[str, Any]]:
    """-> (the quantised checkpoint, the dense one that it stands for, how each module rounds its inputs)."""
    config = {**BASE, **case.changes}
    quantised, dense = folder / "quantised", folder / "dense"
    draw = np.random.default_rng(0)
    stored: Stored = {}
    plain: Stored = {}
    rounds: dict[str, Any] = {}
    for name, values in tensors_of(config).items():
        module = name.removesuffix(".weight")
        writer = case.writer if module.endswith(LINEARS) else None
        for end, other in case.others.items():
            writer = other if module.endswith(end) and name.endswith(".weight") else writer
        if writer is None or not name.endswith(".weight"):
            stored[name] = plain[name] = values
            continue
        written = writer(values.double().numpy(), draw)
        stored |= {f"{module}.{end}": part for end, part in written.tensors.items()}
        plain[name] = torch.from_numpy(written.dense).float()
        rounds[module] = written.rounds
    write_model(dense, case.changes)
    write_tensors(dense, plain)
    quantised.mkdir(parents=True, exist_ok=True)
    if not case.file:
        config["quantization_config"] = case.settings
    else:
        (quantised / case.file).write_text(json.dumps(case.settings))
    (quantised / "config.json").write_text(json.dumps(config))
    write_tensors(quantised, stored, shards)
    for path in (quantised, dense):
        (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return quantised, dense, rounds


def planned(folder: Path, load_way: str = "HF", **options: Any) -> Plan:
    """As `plan_for`, with what the probe finds."""
    facts = model_facts(str(folder), load_way=load_way)
    plan = plan_for(folder, load_way=load_way, **options)
    return msgspec.structs.replace(plan, model=facts, schemes=facts.schemes)
