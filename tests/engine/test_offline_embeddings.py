"""`LLM.embed`: embedding checkpoints as they are published, read, planned and served without a setting."""

from __future__ import annotations

import json
from math import hypot
from pathlib import Path
from typing import Any

import pytest

from embedding_models import Truth, as_base_model, prompts, with_modules
from fake_embeddings import fake_embedding
from lightllmd import LLM
from lightllmd.config.plan import Pooling, PromptEmbedding
from lightllmd.errors import ConfigInvalid, InvalidRequest, WeightsInvalid
from lightllmd.ipc.messages import PoolingParams
from model_folders import TOKENIZER
from scored_models import HEADS, write_scored
from tiny_models import VARIANTS, write_model

QUIET = {"device": "cpu", "threads": 1, "data_type": "float32", "progress": False}
TINY = {"max_req_input_len": 100, "max_req_total_len": 200, "max_total_token_num": 1000, "running_max_req_size": 8}
LAST, MEAN = {"pooling_mode_lasttoken": True}, {"embedding_dimension": 64, "pooling_mode": "mean"}
END = 2  # what the tokenizer ends each text with


def checkpoint(folder: Path, variant: str = "qwen3", *, ended: bool = False, **config: Any) -> Path:
    """With a tokenizer, which appends END to each text if it is `ended`."""
    write_model(folder, VARIANTS[variant] | config)
    tokenizer = dict(TOKENIZER)
    if ended:
        text = next(text for text, number in TOKENIZER["model"]["vocab"].items() if number == END)
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": text, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [END], "tokens": [text]}},
        }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_a_checkpoint_of_the_decoder_alone_embeds_and_does_not_generate(tmp_path: Path) -> None:
    """As Qwen3-Embedding-8B is published: tensors without prefix and head, last token, an end appended."""
    folder = with_modules(as_base_model(checkpoint(tmp_path, ended=True)), LAST, normalised=True)
    truth = Truth(folder)
    with LLM(folder, **TINY, **QUIET) as llm:
        assert llm.plan.embedding == PromptEmbedding(Pooling("last", unit=True), 64)
        assert "engine.pooling" in [derived.name for derived in llm.plan.derived]
        assert [row.name for row in llm.plan.budget.rows if row.name in ("logits", "embeddings")] == ["embeddings"]
        for prompt, told in zip(prompts(), llm.embed(prompt_token_ids=prompts(), progress=False), strict=True):
            assert told.prompt_token_ids == prompt
            assert told.embedding == pytest.approx(truth.vector(prompt, PoolingParams(unit=True)).tolist(), abs=1e-4)
        [told] = llm.embed("abba", progress=False)
        assert told.prompt_token_ids[-1] == END
        assert told.embedding == pytest.approx(
            truth.vector(told.prompt_token_ids, PoolingParams(unit=True)).tolist(), abs=1e-4
        )
        with pytest.raises(InvalidRequest, match="no language model head"):
            llm.generate(prompt_token_ids=[[1]])
        with pytest.raises(InvalidRequest, match="dimensions: should be at most 64"):
            llm.embed("x", dimensions=65)
        with pytest.raises(InvalidRequest, match="dimensions: should be a positive integer"):
            llm.embed("x", dimensions=0)


def test_a_model_that_generates_embeds_between_two_answers(tmp_path: Path) -> None:
    """Pooled as sentence-transformers' settings of either form say, else by its last token."""
    folder = checkpoint(tmp_path, "tied")
    truth = Truth(folder)
    asked = {"prompt_token_ids": prompts(), "progress": False}
    expected = {
        "last": [truth.vector(prompt, PoolingParams(unit=True)).tolist() for prompt in prompts()],
        "mean": [truth.vector(prompt, PoolingParams(mean=True)).tolist() for prompt in prompts()],
    }
    with LLM(folder, **TINY, **QUIET) as llm:
        before = llm.generate(**asked, max_new_tokens=3)
        for told, vector in zip(llm.embed(**asked), expected["last"], strict=True):
            assert told.embedding == pytest.approx(vector, abs=1e-4)
        assert [one.token_ids for one in llm.generate(**asked, max_new_tokens=3)] == [one.token_ids for one in before]
        short = llm.embed(**asked, dimensions=5)
        assert [len(one.embedding) for one in short] == [5] * 6
        assert [hypot(*one.embedding) for one in short] == pytest.approx([1.0] * 6)
    with_modules(folder, MEAN, normalised=False)
    with LLM(folder, **TINY, **QUIET) as llm:
        for told, vector in zip(llm.embed(**asked), expected["mean"], strict=True):
            assert told.embedding == pytest.approx(vector, abs=1e-4)
    with LLM(folder, pooling="cls", **TINY, **QUIET) as llm:
        assert llm.plan.embedding == PromptEmbedding(Pooling("cls", unit=False), 64)


@pytest.mark.parametrize(
    ("pooling", "others", "words"),
    [
        ({"pooling_mode_max_tokens": True}, (), r'1_Pooling/config.json pools by \["max"\]'),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, (), r'pools by \["cls", "mean"\]'),
        ({"pooling_mode": "weightedmean"}, (), r'pools by \["weightedmean"\]'),
        (LAST, ("Dense",), r'modules.json has the modules \["Transformer", "Pooling", "Dense", "Normalize"\]'),
    ],
)
def test_what_no_pooling_here_does_is_refused_when_the_plan_is_made(
    tmp_path: Path, pooling: dict[str, Any], others: tuple[str, ...], words: str
) -> None:
    folder = with_modules(checkpoint(tmp_path), pooling, normalised=True, others=others)
    with pytest.raises(ConfigInvalid, match=words):
        LLM(folder, **TINY, **QUIET)
    with LLM(folder, pooling="last", **TINY, **QUIET) as llm:
        assert llm.plan.embedding == PromptEmbedding(Pooling("last", unit=True), 64)


def test_settings_that_leave_the_folder_or_are_damaged_are_refused(tmp_path: Path) -> None:
    folder = with_modules(checkpoint(tmp_path), LAST, normalised=True)
    modules = json.loads((folder / "modules.json").read_bytes())
    modules[1]["path"] = "../1_Pooling"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ConfigInvalid, match=r"modules.json: .* is no folder of the model"):
        LLM(folder, **TINY, **QUIET)
    (folder / "modules.json").write_text("[")
    with pytest.raises(ConfigInvalid, match=r"modules\.json"):
        LLM(folder, **TINY, **QUIET)


def test_encoders_and_decoders_made_encoders_are_refused_by_name(tmp_path: Path) -> None:
    bert = {"model_type": "modernbert", "architectures": ["ModernBertModel"]}
    folder = checkpoint(tmp_path / "bert")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_bytes()) | bert))
    with pytest.raises(ConfigInvalid, match=r'models of type "modernbert" are not available yet'):
        LLM(folder, **TINY, **QUIET)
    with pytest.raises(ConfigInvalid, match="is_causal = false: attention to later tokens"):
        LLM(checkpoint(tmp_path / "both ways", "qwen2", is_causal=False), **TINY, **QUIET)
    with pytest.raises(ConfigInvalid, match="LlamaBidirectionalModel"):
        LLM(checkpoint(tmp_path / "named", "plain", architectures=["LlamaBidirectionalModel"]), **TINY, **QUIET)


def test_a_head_that_is_missing_for_no_reason_is_still_missed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoint(tmp_path)
    stored = load_file(folder / "model.safetensors")
    del stored["lm_head.weight"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(WeightsInvalid, match=r"lm_head.weight is missing"):
        LLM(folder, **TINY, **QUIET)


def test_a_model_that_scores_gives_no_embeddings(tmp_path: Path) -> None:
    folder = write_scored(tmp_path, HEADS["llama, one label"])
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    with (
        LLM(folder, use_reward_model=True, **TINY, **QUIET) as llm,
        pytest.raises(InvalidRequest, match="use_reward_model = true"),
    ):
        llm.embed(prompt_token_ids=[[1]])


def test_texts_of_the_fake_engine() -> None:
    texts = [f"text {number}" for number in range(60)]
    with LLM(engine={"backend": "fake", "pooling": "mean"}) as llm:
        told = llm.embed(texts, progress=False, max_running=7, normalize=False)
    for text, one in zip(texts, told, strict=True):
        assert one.embedding == pytest.approx(fake_embedding(list(text.encode()), PoolingParams(mean=True)), abs=1e-6)
