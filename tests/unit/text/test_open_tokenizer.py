"""The tokenizer that a plan or a directory names, with what its JSON files say."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Budget, DeviceFacts, ModelFacts, Plan
from lightllmd.config.stamps import stamp
from lightllmd.errors import InvalidRequest, ModelChanged
from lightllmd.text import ByteTokenizer, IdTokenizer, load_tokenizer, open_tokenizer
from lightllmd.weights.model_files import text_files


def write_model(folder: Path, config: dict[str, object] | None = None, **files: object) -> Path:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(["hello world"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    backend.add_special_tokens(["<bos>", "<eos>", "<turn>"])
    bos = backend.token_to_id("<bos>")
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    backend.decoder = decoders.ByteLevel()
    backend.enable_truncation(4)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, **(config or {})})
    )
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def plan(model: ModelFacts | None, eos: list[int]) -> Plan:
    device = DeviceFacts("cpu", "cpu", 1, 1, 1, ["float32"], 1)
    values = {
        "config": Config(), "model": model, "device": device, "derived": [], "budget": Budget([], 0),
        "max_total_token_num": 1, "batch_max_tokens": 1, "eos_id": eos, "data_type": "float32",
        "tokenizer_mode": "fast", "log_stats_interval": 10.0, "vocab_size": 257, "model_name": "m",
    }  # fmt: skip
    return msgspec.convert(values, Plan, from_attributes=True)


def test_plan_without_a_model_is_the_fake_backends():
    tokenizer = load_tokenizer(plan(None, [256]))
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.eos_ids == [256]


def test_the_plans_eos_ids_are_in_force(tmp_path):
    write_model(tmp_path, generation_config={"eos_token_id": [1]})
    facts = ModelFacts(str(tmp_path), "safetensors", "llama", {}, [], 0, 0, None, None, [], True, False)
    assert load_tokenizer(plan(facts, [7, 8])).eos_ids == [7, 8]
    assert open_tokenizer(tmp_path).eos_ids == [1]


def test_files_that_are_not_the_plans_are_refused(tmp_path):
    """Or one api worker that starts again would disagree with the others."""
    write_model(tmp_path)
    stamps = [stamp(str(file)) for file in text_files(tmp_path)]
    facts = ModelFacts(str(tmp_path), "safetensors", "llama", {}, [], 0, 0, None, None, [], True, False, stamps=stamps)
    assert load_tokenizer(plan(facts, [2])).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ModelChanged, match=r"chat_template\.jinja changed since .*it was not there"):
        load_tokenizer(plan(facts, [2]))


def test_random_weights_without_a_tokenizer_have_ids_as_text(tmp_path):
    bare = ModelFacts(str(tmp_path), "dummy", "llama", {}, [], 0, 0, None, None, [], False, False)
    assert isinstance(load_tokenizer(plan(bare, [2])), IdTokenizer)
    write_model(tmp_path)
    assert load_tokenizer(plan(msgspec.structs.replace(bare, has_tokenizer=True), [2])).encode("hello")


def test_post_processor_decides_about_bos_unless_the_configuration_does(tmp_path):
    tokenizer = open_tokenizer(write_model(tmp_path))
    bos, eos = tokenizer.bos_id, tokenizer.eos_ids[0]
    hello = tokenizer.encode("hello", add_special_tokens=False)
    assert tokenizer.encode("hello") == [bos, *hello]
    for switches, expected in [
        ({"add_bos_token": False}, hello),
        ({"add_bos_token": True, "add_eos_token": True}, [bos, *hello, eos]),
        ({"add_bos_token": True}, [bos, *hello]),
    ]:
        tokenizer = open_tokenizer(write_model(tmp_path, switches))
        assert tokenizer.encode("hello") == expected
        assert tokenizer.encode_batch(["hello"]) == [expected]
        assert tokenizer.encode("hello", add_special_tokens=False) == hello


def test_truncation_of_the_file_is_not_ours(tmp_path):
    assert len(open_tokenizer(write_model(tmp_path)).encode("x" * 100)) == 101


def test_tokens_that_have_a_role_are_special(tmp_path):
    tokenizer = open_tokenizer(write_model(tmp_path, {"additional_special_tokens": ["hello"]}))
    assert tokenizer.is_special(tokenizer.bos_id)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("ab", False)]) == "ab"


@pytest.mark.parametrize("place", ["config", "list", "jinja", "json"])
def test_chat_template_is_found_wherever_models_keep_it(tmp_path, place):
    source = "{{ bos_token }}{{ messages[0].content }}"
    if place == "config":
        write_model(tmp_path, {"chat_template": source})
    elif place == "list":
        write_model(tmp_path, {"chat_template": [{"name": "rag", "template": "no"}, {"name": "default", "template": source}]})  # fmt: skip  # noqa: E501
    elif place == "jinja":
        write_model(tmp_path, {"chat_template": "superseded"})
        (tmp_path / "chat_template.jinja").write_text(source)
    else:
        write_model(tmp_path, chat_template={"chat_template": source})
    tokenizer = open_tokenizer(tmp_path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hello"}])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello", add_special_tokens=False)]  # one bos, not two


def test_broken_chat_template_is_a_warning_and_refuses_chat_only(tmp_path):
    tokenizer = open_tokenizer(write_model(tmp_path, {"chat_template": "{% if %}"}))
    assert any("chat requests will be refused" in warning for warning in tokenizer.warnings)
    with pytest.raises(InvalidRequest):
        tokenizer.encode_chat([{"role": "user", "content": "x"}])
    assert tokenizer.encode("hello")


def test_vocab_and_merges_alone_are_enough(tmp_path):
    write_model(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    reference = open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(whole["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<bos>": reference.bos_id, "<eos>": reference.eos_ids[0]}))
    tokenizer = open_tokenizer(tmp_path)
    text = "hello wörld <eos>"
    assert tokenizer.encode(text, add_special_tokens=False) == reference.encode(text, add_special_tokens=False)
    assert tokenizer.decode(tokenizer.encode(text)) == "hello wörld "
