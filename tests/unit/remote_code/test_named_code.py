"""A checkpoint that names code of its own is refused with file, class and switch; nothing is executed to find that."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightllmd.errors import EXIT_CONFIG, ConfigInvalid
from lightllmd.probe.model import model_facts
from lightllmd.remote_code.named import named_code
from model_folders import write_folder
from remote_checkpoints import CONFIG_CODE, write_code

FATAL = "raise SystemExit('this was executed')"
TOKENIZER = {"auto_map": {"AutoTokenizer": ["tokenization_odd.OddTokenizer", None]}}

# (settings file, its entries, the .py file, the class)
WAYS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "config": ("config", {"auto_map": {"AutoConfig": "configuration_odd.OddConfig"}}, "configuration_odd", "OddConfig"),
    "model": ("config", {"auto_map": {"AutoModelForCausalLM": "modeling_odd.OddLM"}}, "modeling_odd", "OddLM"),
    "tokenizer": ("tokenizer_config", TOKENIZER, "tokenization_odd", "OddTokenizer"),
    "tokenizer in config.json": ("config", TOKENIZER, "tokenization_odd", "OddTokenizer"),
    "a list for a tokenizer": ("tokenizer_config", {"auto_map": ["t.Slow", "t.Fast"]}, "t", "Fast"),
    "a text for a tokenizer": ("tokenizer_config", {"auto_map": "t.Slow"}, "t", "Slow"),
    "processor": ("processor_config", {"auto_map": {"AutoProcessor": "processing.Own"}}, "processing", "Own"),
    "image processor": ("preprocessor_config", {"auto_map": {"AutoImageProcessor": "images.Own"}}, "images", "Own"),
    "generation": ("generation_config", {"auto_map": {"GenerationConfig": "made.Own"}}, "made", "Own"),
    "custom_generate": ("generation_config", {}, "custom_generate/generate", "generate"),
    "a class of a file": ("tokenizer_config", {"tokenizer_class": "OddTokenizer"}, "anything", "OddTokenizer"),
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_code_is_refused_in_one_sentence_with_file_class_and_switch(
    tmp_path: Path, way: tuple[str, dict[str, Any], str, str]
) -> None:
    settings, entries, module, name = way
    folder = write_code(tmp_path / "m", {f"{module}.py": f"{FATAL}\nclass {name}:\n    pass\n"}, **{settings: entries})
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder))
    [problem] = refused.value.problems
    assert problem.key == "trust_remote_code"
    assert f"{name} of {module}.py (" in problem.message
    assert problem.message.endswith("which runs only with trust_remote_code = true")
    assert "\n" not in problem.message


def test_all_that_is_named_is_in_one_sentence(tmp_path: Path) -> None:
    maps = {f"AutoModelFor{number}": f"m.Class{number}" for number in range(7)}
    folder = write_code(tmp_path / "m", {}, config={"auto_map": maps}, tokenizer_config=TOKENIZER)
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder))
    [problem] = refused.value.problems
    assert "OddTokenizer of tokenization_odd.py (tokenizer_config.json: AutoTokenizer)" in problem.message
    assert "4 more, which runs only" in problem.message


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("settings", ["config", "tokenizer_config", "generation_config"])
def test_a_class_of_another_repository_is_refused_by_name_either_way(
    tmp_path: Path, settings: str, trusted: bool
) -> None:
    entries: dict[str, Any] = {"auto_map": {"AutoTokenizer": ["Qwen/Qwen-7B--tokenization_qwen.QWenTokenizer", None]}}
    if settings == "generation_config":
        entries = {"custom_generate": "transformers-community/dola"}
    folder = write_code(tmp_path / "m", {"tokenization_qwen.py": FATAL}, **{settings: entries})
    with pytest.raises(ConfigInvalid) as refused:
        model_facts(str(folder), trust_remote_code=trusted)
    [problem] = refused.value.problems
    assert f"{settings}.json" in problem.message
    assert "of another repository" in problem.message
    assert ("Qwen/Qwen-7B" in problem.message) == (settings != "generation_config")


@pytest.mark.parametrize(
    "entries",
    [
        {"auto_map": 7},
        {"auto_map": {"AutoConfig": "no_class"}},
        {"auto_map": {"AutoConfig": "../outside.Class"}},
        {"auto_map": {"AutoConfig": "a.b.Class"}},
        {"auto_map": {"AutoConfig": {"module": "Class"}}},
        {"auto_map": {"not a class": "module.Class"}},
        {"auto_map": [7]},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("trusted", [False, True])
def test_what_has_no_form_is_refused_by_name(tmp_path: Path, entries: dict[str, Any], trusted: bool) -> None:
    folder = write_code(tmp_path / "m", {}, config=entries)
    with pytest.raises(ConfigInvalid, match=r"config\.json: "):
        model_facts(str(folder), trust_remote_code=trusted)


def test_a_file_that_is_named_and_missing_is_refused_by_name(tmp_path: Path) -> None:
    unused = {"AutoModelForCausalLM": "modeling_odd.OddLM"}
    folder = write_code(tmp_path / "m", {}, config={"auto_map": unused})
    assert model_facts(str(folder), trust_remote_code=True).remote_code == unused  # the family is built in
    folder = write_code(tmp_path / "m", {}, config={"auto_map": {"AutoConfig": "configuration_odd.OddConfig"}})
    with pytest.raises(ConfigInvalid, match=r"AutoConfig is OddConfig of configuration_odd\.py, which is not in"):
        model_facts(str(folder), trust_remote_code=True)


@pytest.mark.parametrize(
    "entries",
    [{}, {"auto_map": {}}, {"auto_map": None}, {"auto_map": {"AutoTokenizer": [None, None]}}],
    ids=json.dumps,
)
def test_files_that_nothing_names_are_no_code_of_the_checkpoint(tmp_path: Path, entries: dict[str, Any]) -> None:
    folder = write_code(tmp_path / "m", {"convert.py": FATAL}, config=entries, tokenizer_config=entries)
    assert model_facts(str(folder)).remote_code == {}


def test_a_file_that_nothing_names_may_be_anything(tmp_path: Path) -> None:
    folder = write_code(tmp_path / "m", {}, tokenizer_config={"tokenizer_class": "OddTokenizer"})
    (folder / "latin.py").write_bytes("# größe\nclass Other:\n    pass".encode("latin-1"))
    (folder / "pointer.py").write_text("version https://git-lfs.github.com/spec/v1\nclass OddTokenizer:\n")
    (folder / "gone.py").symlink_to("nowhere")
    (folder / "folder.py").mkdir()
    assert model_facts(str(folder)).remote_code == {}


def test_a_tokenizer_class_that_transformers_has_is_none_of_the_checkpoints(tmp_path: Path) -> None:
    folder = write_code(
        tmp_path / "m",
        {"tokenization_llama.py": f"{FATAL}\nclass LlamaTokenizerFast:\n    pass\n"},
        tokenizer_config={"tokenizer_class": "LlamaTokenizerFast"},
    )
    assert model_facts(str(folder)).remote_code == {}


def test_of_two_tokenizers_the_mode_chooses(tmp_path: Path) -> None:
    folder = write_code(tmp_path / "m", {}, tokenizer_config={"auto_map": {"AutoTokenizer": ["t.Slow", "t.Fast"]}})
    assert [one.class_name for one in named_code(folder, slow_tokenizer=True)] == ["Slow"]
    assert [one.class_name for one in named_code(folder)] == ["Fast"]


def test_with_the_switch_its_own_class_makes_the_settings(tmp_path: Path) -> None:
    folder = write_code(
        tmp_path / "m",
        {"configuration_odd.py": f"print('to be found in the log')\n{CONFIG_CODE}", "modeling_odd.py": FATAL},
        config={
            "hidden_size": "twice the width",
            "width": 8,
            "auto_map": {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddLM"},
        },
    )
    asked = {"model_dir": str(folder), "trust_remote_code": True, "device": "cpu"}
    command = [sys.executable, "-m", "lightllmd.probe"]
    done = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, timeout=120)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == 0, answer
    model = answer["model"]
    assert model["hf_config"]["hidden_size"] == 16
    assert model["remote_code"]["AutoModelForCausalLM"] == "modeling_odd.OddLM"  # the family is built in, so unused
    assert {str(folder / "configuration_odd.py"), str(folder / "modeling_odd.py")} <= {
        one["path"] for one in model["stamps"]
    }
    assert b"to be found in the log" in done.stderr


def test_the_probe_ends_with_the_exit_code_of_a_wrong_configuration(tmp_path: Path) -> None:
    folder = write_code(tmp_path / "m", {}, tokenizer_config=TOKENIZER)
    command = [sys.executable, "-m", "lightllmd.probe"]
    done = subprocess.run(
        command, input=json.dumps({"model_dir": str(folder)}).encode(), capture_output=True, timeout=60
    )
    assert done.returncode == EXIT_CONFIG
    assert "trust_remote_code" in json.loads(done.stdout.splitlines()[-1])["message"]


def test_the_files_that_may_be_imported_are_stamped(tmp_path: Path) -> None:
    files = {"a.py": "", "package/b.py": "", "package/deeper/c.py": ""}
    (tmp_path / "m" / "package" / "deeper").mkdir(parents=True)
    folder = write_code(tmp_path / "m", files, config={"auto_map": {"AutoModel": "a.Own"}})
    (folder / "folder.py").mkdir()
    facts = model_facts(str(folder), trust_remote_code=True)
    assert {one.path for one in facts.stamps if one.path.endswith(".py")} == {
        str(folder / "a.py"),
        str(folder / "package/b.py"),
    }
    assert str(folder / "a.py") in {one.path for one in facts.text_stamps}
    for number in range(300):
        (folder / f"{number}.py").touch()
    with pytest.raises(ConfigInvalid, match=r"more than 256 \.py files"):
        model_facts(str(folder), trust_remote_code=True)


def test_a_folder_without_names_of_code_has_none(tmp_path: Path) -> None:

    assert named_code(write_folder(tmp_path / "m")) == []
