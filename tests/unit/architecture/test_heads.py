"""What a config says of the head behind the last norm."""

from __future__ import annotations

from typing import Any

import pytest

from lightllmd.architecture.families import architecture_of
from lightllmd.architecture.heads import ScoredModel, scored_model
from lightllmd.architecture.spec import ScoreHead
from lightllmd.errors import ConfigInvalid

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForSequenceClassification"],
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 128,
}


def labels(**changes: Any) -> tuple[str, ...]:
    found = scored_model(LLAMA | changes)
    assert found is not None
    return found.labels


def test_labels_are_in_the_order_of_the_values() -> None:
    assert labels() == ("LABEL_0", "LABEL_1")
    assert labels(num_labels=1) == ("LABEL_0",)
    assert labels(id2label={"1": "good", "0": "bad"}) == ("bad", "good")
    assert labels(id2label={"0": "reward"}, num_labels=2) == ("reward",)  # as transformers takes it


@pytest.mark.parametrize("named", [None, [], ["LlamaForCausalLM"], ["GPT2LMHeadModel", "LlamaForCausalLM"], "x"])
def test_a_causal_model_has_none(named: Any) -> None:
    assert scored_model(LLAMA | {"architectures": named}) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForTokenClassification"]}, "ForTokenClassification.* is not available yet"),
        ({"architectures": ["LlamaBidirectionalForSequenceClassification"]}, "Bidirectional.*is not available yet"),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification.*not available yet"),
        ({"num_labels": 0}, "num_labels is 0, an integer from 1 to 4096"),
        ({"num_labels": 5000}, "num_labels is 5000"),
        ({"num_labels": True}, "num_labels is true"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label is .*a name for each of 0 to 1"),
        ({"id2label": {"0": 1}}, "id2label is"),
        ({"id2label": {"0": "x" * 40_001}}, "id2label has names of 40001 bytes in all, at most 40000"),
        ({"problem_type": 3}, "problem_type is 3, a name is needed"),
        ({"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 128}, "reward_token_id is 128"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "go through .*Tanh"),
        ({"sbert_ce_default_activation_function": 3}, "go through 3; Sigmoid and Identity"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigInvalid, match=words):
        scored_model(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "raw"),
    [
        ({}, False),
        ({"sentence_transformers": {"activation_fn": None, "version": "5"}}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, False),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, True),
        (
            {
                "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
                "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
            },
            False,
        ),
    ],
)
def test_how_pairs_are_told_is_as_sentence_transformers_writes_it(changes: dict[str, Any], raw: bool) -> None:
    found = scored_model(LLAMA | changes)
    assert found is not None
    assert found.raw_pairs is raw


def test_heads_of_reward_models() -> None:
    internlm2 = scored_model(LLAMA | {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 99})
    assert internlm2 == ScoredModel(ScoreHead(1), {"score": "v_head"}, ("LABEL_0",), ending=99)
    names = {"score_inner": "score.0", "score": "score.2"}
    outcome = scored_model(LLAMA | {"architectures": ["Qwen2ForRewardModel"]})
    assert outcome == ScoredModel(ScoreHead(1, 64, True), names, ("LABEL_0",))
    steps = scored_model(LLAMA | {"architectures": ["Qwen2ForProcessRewardModel"]})
    assert steps is not None
    assert (steps.head, steps.steps) == (ScoreHead(2, 64, True), True)


def test_the_weights_are_those_of_the_head_instead_of_the_vocabularys() -> None:
    for tied in (False, True):
        scored = architecture_of("llama", LLAMA | {"tie_word_embeddings": tied})
        *_, norm, score = scored.weights
        assert [(part.name, part.shape) for part in score.stored] == [("score.weight", (2, 64))]
        assert norm.role == "norm"
        assert scored.ignores("lm_head.weight")


def test_queries_keys_and_values_in_one_tensor_are_in_groups() -> None:
    config = LLAMA | {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "num_key_value_heads": 2}
    (qkv,) = [weight for weight in architecture_of("internlm2", config).weights if weight.role == "qkv"]
    assert [(part.name, part.shape, part.shard_unit) for part in qkv.parts] == [
        ("model.layers.0.attention.wqkv.weight", (128, 64), 64)
    ]
    assert qkv.groups == (32, 16, 16)
