"""What is loaded is what the files say; a checkpoint that doesn't fit its config is refused by the tensor's name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightllmd.engine.runners.cpu import CpuRunner
from lightllmd.errors import ConfigInvalid, WeightsInvalid
from lightllmd.weights.safetensors import SafetensorsCheckpoint
from tiny_models import Driver, load, plan_for, write_model, write_tensors

IDS = [3, 14, 15, 92, 65, 35]


def logits(folder: Path, **options: Any) -> torch.Tensor:
    driver = Driver(load(folder, **options))
    return driver.logits(driver.row(0, IDS))[0]


def changed(folder: Path, change: Any) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    write_tensors(folder, tensors)
    return folder


def configured(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_shards_hold_the_same_model_as_one_file(tmp_path: Path) -> None:
    whole, sharded = write_model(tmp_path / "whole"), write_model(tmp_path / "sharded", shards=4)
    assert torch.equal(logits(whole), logits(sharded))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_other_stored_dtypes_are_converted(tmp_path: Path, stored: torch.dtype) -> None:
    folder = write_model(tmp_path)
    rounded = changed(folder, lambda tensors: tensors.update({k: v.to(stored) for k, v in tensors.items()}))
    expected = logits(rounded)
    assert torch.equal(
        logits(changed(folder, lambda tensors: tensors.update({k: v.float() for k, v in tensors.items()}))), expected
    )


def test_bfloat16_computes_close_to_float32(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    exact, rounded = logits(folder), logits(folder, dtype="bfloat16")
    assert rounded.dtype is torch.float32
    assert (exact - rounded).abs().max() < 0.1 * exact.abs().max()


def test_progress_ends_at_the_bytes_of_the_checkpoint(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {"attention_bias": True})
    seen: list[tuple[int, int]] = []
    CpuRunner().load(plan_for(folder), lambda done, total: seen.append((done, total)))
    held = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert seen[-1] == (held, held)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_tied_model_may_repeat_its_embedding_and_old_ones_their_frequencies(tmp_path: Path) -> None:
    folder = write_model(tmp_path, {"tie_word_embeddings": True})
    expected = logits(folder)
    extras = {"lm_head.weight": torch.ones(128, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    assert torch.equal(logits(changed(folder, lambda tensors: tensors.update(extras))), expected)


NORM = "model.layers.1.input_layernorm.weight"
BROKEN: dict[str, tuple[Any, list[str]]] = {
    "missing": (lambda tensors: tensors.pop(NORM), [NORM, "missing", "[64]"]),
    "extra": (lambda tensors: tensors.update({"model.surprise": torch.ones(2, 3)}), ["model.surprise", "[2, 3]"]),
    "wrong shape": (lambda tensors: tensors.update({NORM: torch.ones(65)}), [NORM, "[65]", "[64]"]),
    "transposed": (
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight": torch.ones(64, 96)}),
        ["model.layers.0.mlp.up_proj.weight", "[64, 96]", "[96, 64]"],
    ),
    "unknown bias": (
        lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        ["model.layers.0.self_attn.q_proj.bias", "[64]"],
    ),
    "integers": (lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int64)}), [NORM, "I64"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    change, words = BROKEN[fault]
    folder = changed(write_model(tmp_path), change)
    with pytest.raises(WeightsInvalid) as refused:
        load(folder)
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_file_that_was_cut_off_after_the_probe_is_refused_by_tensor(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    plan = plan_for(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(WeightsInvalid, match=r"truncated: tensor model\.|truncated: tensor lm_head"):
        CpuRunner().load(plan, lambda done, total: None)


def test_one_name_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    plan = plan_for(folder)
    twice = plan.model.files * 2  # type: ignore[union-attr]
    with pytest.raises(WeightsInvalid, match=r"tensor .* is in .* and in another"):
        SafetensorsCheckpoint(twice)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"num_attention_heads": "four"}, 'num_attention_heads is "four"'),
        ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"hidden_act": "mish"}, 'hidden_act "mish" is not available yet'),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 'rope type "yarn" is not available yet'),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": True}}, "rope_scaling.factor is true"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not available yet"),
        ({"model_type": "bloom"}, "'bloom' are not available yet"),
    ],
)
def test_a_config_that_can_not_be_run_is_refused_by_key(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = configured(write_model(tmp_path), **changes)
    with pytest.raises(ConfigInvalid) as refused:
        load(folder)
    assert words in str(refused.value)
