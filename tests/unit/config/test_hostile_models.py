"""Model folders that are damaged, hostile or of another kind: refused when the plan is made, in one sentence with the
file's name, soon; whatever the probe lets through the api workers' tokenizer and the engine's layout take."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightllmd.config.load import load
from lightllmd.errors import EXIT_CONFIG, ConfigInvalid, LightllmdError
from lightllmd.probe.model import model_facts
from lightllmd.supervisor.children.probing import answered
from model_folders import LLAMA, TOKENIZER, write_folder

SECONDS = 10
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98362432\n"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    """What waits or goes on for ever fails, whatever it does."""

    def late(*_: object) -> None:
        raise AssertionError(f"not refused within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def writes(name: str, body: str | bytes | dict[str, Any] | list[Any]) -> tuple[str, Damage]:
    raw = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()

    def damage(folder: Path) -> None:
        if name == INDEX:
            (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(raw)

    return name, damage


def config(**changes: Any) -> tuple[str, Damage]:
    return writes("config.json", LLAMA | changes)


def settings(**entries: Any) -> tuple[str, Damage]:
    return writes("tokenizer_config.json", entries)


def instead(name: str, make: Callable[[Path], object]) -> tuple[str, Damage]:
    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return name, damage


def loop(path: Path) -> None:
    path.with_name("other").symlink_to(path)
    path.symlink_to(path.with_name("other"))


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def header(body: bytes, rest: int = 64) -> bytes:
    return struct.pack("<Q", len(body)) + body + bytes(rest)


def one_shard(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder / name)


NESTED = "[" * 200_000 + "]" * 200_000
DEEP = '{"a":' * 50_000 + "1" + "}" * 50_000
FILES = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
FILES += ["model.safetensors", "chat_template.jinja"]

CASES: dict[str, tuple[str, Damage]] = {
    # --- sizes
    "layers huge": config(num_hidden_layers=10**9),
    "layers negative": config(num_hidden_layers=-1),
    "layers zero": config(num_hidden_layers=0),
    "layers true": config(num_hidden_layers=True),
    "hidden size 10^30": config(hidden_size=10**30),
    "hidden size a number with digits": config(hidden_size=16.5),
    "vocabulary huge": config(vocab_size=10**12),
    "heads huge": config(num_attention_heads=10**9),
    "more heads than hidden": config(num_attention_heads=64),
    "no multiple of key heads": config(num_key_value_heads=3),
    "odd head_dim": config(head_dim=3),
    "head_dim negative": config(head_dim=-4),
    "intermediate a list": config(intermediate_size=[32]),
    "context 10^30": config(max_position_embeddings=10**30),
    "context a text": config(max_position_embeddings="4096"),
    # --- numbers
    "rms_norm_eps NaN": config(rms_norm_eps=float("nan")),
    "rms_norm_eps infinite": config(rms_norm_eps=float("inf")),
    "rms_norm_eps zero": config(rms_norm_eps=0),
    "rms_norm_eps a text": config(rms_norm_eps="1e-5"),
    "rms_norm_eps a list": config(rms_norm_eps=[]),
    "rope_theta zero": config(rope_theta=0),
    "rope_theta infinite": config(rope_theta=float("inf")),
    "rope_theta NaN": config(rope_theta=float("nan")),
    "rope_theta 10^400": writes("config.json", json.dumps(LLAMA)[:-1] + ', "rope_theta": 1' + "0" * 400 + "}"),
    "a number of 10,000 digits": writes("config.json", json.dumps(LLAMA)[:-1] + ', "x": ' + "1" * 10_000 + "}"),
    "rope_scaling a list": config(rope_scaling=[1]),
    "rope type a list": config(rope_scaling={"rope_type": ["linear"]}),
    "rope factor NaN": config(rope_scaling={"rope_type": "linear", "factor": float("nan")}),
    "rope factor missing": config(rope_scaling={"rope_type": "dynamic"}),
    "rope factor a text": config(rope_scaling={"rope_type": "linear", "factor": "2"}),
    "llama3 without its frequencies": config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
    "longrope with texts": config(
        rope_scaling={
            "rope_type": "longrope",
            "long_factor": ["x"] * 2,
            "short_factor": ["x"] * 2,
            "attention_factor": 1,
        }
    ),
    "activation an object": config(hidden_act={"name": "silu"}),
    "tied neither true nor false": config(tie_word_embeddings="false"),
    "biased neither true nor false": config(attention_bias=1),
    # --- what it is
    "model_type a number": config(model_type=5),
    "model_type missing": config(model_type=None),
    "model_type unknown": config(model_type="x" * 100_000),
    "architectures of another kind": config(architectures=["BertModel"]),
    "eos 10^30": config(eos_token_id=10**30),
    "eos negative": config(eos_token_id=-5),
    "eos beyond the vocabulary": config(eos_token_id=[2, 100]),
    "eos an object": config(eos_token_id={"a": 1}),
    "eos true": config(eos_token_id=True),
    "eos of the generation a text": writes("generation_config.json", {"eos_token_id": "2"}),
    "eos of the generation 10^30": writes("generation_config.json", {"eos_token_id": [10**30]}),
    # --- JSON
    **{f"{name}: no JSON": writes(name, "{") for name in FILES[:5]},
    **{f"{name}: a list": writes(name, "[]") for name in FILES[:5]},
    **{f"{name}: null": writes(name, "null") for name in FILES[:5]},
    **{f"{name}: nested": writes(name, NESTED) for name in FILES[:5]},
    **{f"{name}: nested objects": writes(name, DEEP) for name in FILES[:5]},
    **{f"{name}: no UTF-8": writes(name, b'{"\xff": 1}') for name in FILES[:5]},
    **{f"{name}: empty": writes(name, "") for name in FILES[:6]},
    **{f"{name}: an LFS pointer": writes(name, POINTER) for name in FILES},
    # --- kinds of files
    **{f"{name}: a pipe": instead(name, lambda path: os.mkfifo(path)) for name in FILES},
    **{f"{name}: a folder": instead(name, Path.mkdir) for name in FILES},
    **{f"{name}: a loop of links": instead(name, loop) for name in FILES},
    **{f"{name}: a link to nowhere": instead(name, lambda path: path.symlink_to("/nowhere")) for name in FILES},
    **{f"{name}: endless": instead(name, lambda path: path.symlink_to("/dev/zero")) for name in FILES},
    **{f"{name}: 1 TiB": instead(name, sparse) for name in FILES},
    "config.json: missing": instead("config.json", lambda path: None),
    # --- tokenizer
    "a template without a name": settings(chat_template=[{"template": "x"}]),
    "a template that is a number": settings(chat_template=5),
    "templates that are numbers": settings(chat_template={"default": 5}),
    "bos a number": settings(bos_token=5),
    "eos a list": settings(eos_token=["</s>"]),
    "add_bos_token a text": settings(add_bos_token="false"),
    "special tokens a number": settings(additional_special_tokens=7),
    "special tokens of numbers": settings(additional_special_tokens=[7]),
    "added tokens a list": settings(added_tokens_decoder=[]),
    "added tokens of numbers": settings(added_tokens_decoder={"1": 3}),
    "an added token at no number": settings(added_tokens_decoder={"one": {"content": "x"}}),
    "tokenizer_class a list": settings(tokenizer_class=["Qwen2Tokenizer"]),
    "tokenizer.json of another form": writes("tokenizer.json", {"model": 5}),
    "tokenizer.json with an id of 2^31": writes(
        "tokenizer.json", TOKENIZER | {"model": {"type": "BPE", "vocab": {"a": 2**31}, "merges": []}}
    ),
    "tokenizer.json with merges of what is not there": writes(
        "tokenizer.json", TOKENIZER | {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["x y"]}}
    ),
    "tokenizer.json with a broken pattern": writes(
        "tokenizer.json",
        TOKENIZER
        | {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    ),
    "a template of 2 MB": writes("chat_template.jinja", "x" * (2 << 20)),
    "a template that is no UTF-8": writes("chat_template.jinja", b"{{ x }}\xff"),
    # --- weights
    "a header that is no JSON": writes("model.safetensors", header(b"{" * 64)),
    "a header nested deeply": writes("model.safetensors", header(NESTED.encode())),
    "a header of 2^60 bytes": writes("model.safetensors", struct.pack("<Q", 1 << 60) + bytes(64)),
    "a tensor of 10^5 dimensions": writes(
        "model.safetensors",
        header(json.dumps({"a": {"dtype": "F32", "shape": [1] * 10**5, "data_offsets": [0, 4]}}).encode()),
    ),
    "a shape that is a text": writes(
        "model.safetensors", header(b'{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}')
    ),
    "an index that is a list": writes(INDEX, "[]"),
    "an index without weights": writes(INDEX, {"metadata": {}}),
    "an index of numbers": writes(INDEX, {"weight_map": {"a": 1}}),
    "an index nested deeply": writes(INDEX, '{"weight_map": ' + NESTED + "}"),
    "an index that leads out": writes(INDEX, {"weight_map": {"a": "../../../etc/passwd"}}),
    "an index that leads out by its root": writes(INDEX, {"weight_map": {"a": "/etc/passwd"}}),
    "an index of files that are missing": (
        "gone-0000.safetensors",
        writes(INDEX, {"weight_map": {f"t{n}": f"gone-{n:04}.safetensors" for n in range(5000)}})[1],
    ),
    "99999999999 shards": (
        "model-00000000002-of-99999999999.safetensors",
        lambda folder: one_shard(folder, "model-00000000001-of-99999999999.safetensors"),
    ),
    "no weights": ("*.safetensors", lambda folder: (folder / "model.safetensors").unlink()),
}


def refusal(model_dir: Path | str, **options: Any) -> str:
    with pytest.raises(LightllmdError) as refused:
        model_facts(str(model_dir), **options)
    assert refused.value.exit_code == EXIT_CONFIG
    problems = refused.value.parameters.get("problems") or [{"message": refused.value.message}]
    (message,) = [problem["message"] for problem in problems]
    assert "\n" not in message
    assert len(message) < 1000
    return message


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_folder_is_refused_by_its_files_name(tmp_path: Path, case: str) -> None:
    name, damage = CASES[case]
    damage(write_folder(tmp_path / "model"))
    message = refusal(tmp_path / "model")
    assert name in message
    assert str(tmp_path / "model") in message


# What transformers computes where it may, and our family does not.
NOT_BUILT = {
    "rope type": config(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
    "rope type of no one": config(rope_scaling={"rope_type": "x" * 1000}),
    "partial rotary": config(partial_rotary_factor=0.5),
    "activation": config(hidden_act="mish"),
}


@pytest.mark.parametrize("case", NOT_BUILT)
def test_what_the_family_lacks_is_refused_by_its_files_name(tmp_path: Path, case: str) -> None:
    name, damage = NOT_BUILT[case]
    damage(write_folder(tmp_path / "model"))
    message = refusal(tmp_path / "model", backend="lightllmd")
    assert str(tmp_path / "model" / name) in message
    assert "not available yet" in message


# What is odd and harmless, and may stay so.
HARMLESS: dict[str, Damage] = {
    "nothing": lambda folder: None,
    "a number that no integer type holds": config(irrelevant=10**30)[1],
    "numbers that JSON has not": config(irrelevant=[float("nan"), float("inf")])[1],
    "surrogates": config(irrelevant="\ud800")[1],
    "a megabyte less a bit": config(irrelevant="x" * 900_000)[1],
    "transformers' huge model_max_length": settings(model_max_length=int(1e30))[1],
    "null for everything": settings(chat_template=None, bos_token=None, added_tokens_decoder=None, add_bos_token=None)[
        1
    ],
    "a template with a syntax error": settings(chat_template="{% if %}")[1],
    "a template nested too deeply": settings(chat_template="{{ 1 +" + "(" * 5000 + "1" + ")" * 5000 + "}}")[1],
    "a template with a byte order mark": writes("chat_template.jinja", b"\xef\xbb\xbf{{ 1 }}")[1],
    "a config with a byte order mark": writes("config.json", b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())[1],
    "a tied head stored twice": config(tie_word_embeddings=True)[1],
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_harmless_is_taken(tmp_path: Path, case: str) -> None:
    HARMLESS[case](write_folder(tmp_path / "model"))
    facts = model_facts(str(tmp_path / "model"))
    assert facts.has_tokenizer


@pytest.mark.parametrize("case", ["layers huge", "hidden size 10^30", "context 10^30", "rms_norm_eps NaN", "eos 10^30"])
def test_random_weights_are_judged_alike(tmp_path: Path, case: str) -> None:
    name, damage = CASES[case]
    damage(write_folder(tmp_path / "model"))
    assert name in refusal(tmp_path / "model", load_way="DUMMY")


@pytest.mark.parametrize(
    ("model_dir", "part"),
    [
        ("~nosuchuser/model", "no user of that name"),
        ("/dev/null", "neither a directory nor a .gguf file"),
        ("/" + "x" * 900_000, "File name too long"),
        ("/a\0b", "can't be read"),
        ("package:" + "x" * 900_000, "package"),
        ("package:__main__", "package"),
    ],
)
def test_a_model_dir_that_can_be_none_is_refused(model_dir: str, part: str) -> None:
    assert part in refusal(model_dir)


def test_a_library_that_never_comes_back_is_ended_and_the_model_named(tmp_path: Path) -> None:
    code = (
        "import itertools\n"
        "from lightllmd.probe import __main__ as probe, facts\n"
        "facts.model_facts = lambda *_, **__: sum(itertools.repeat(0))\n"
        "probe.CPU_SECONDS = 0\n"
        "probe.main()"
    )
    asked = json.dumps({"model_dir": str(tmp_path), "device": "cpu"}).encode()
    signal.alarm(60)
    done = subprocess.run([sys.executable, "-c", code], input=asked, capture_output=True, timeout=60)
    with pytest.raises(ConfigInvalid, match="takes too much processor time") as refused:
        answered(done.returncode, done.stdout, "", load(None, {"model_dir": str(tmp_path)}), None)
    (problem,) = refused.value.problems
    assert (problem.key, str(tmp_path) in problem.message) == ("model_dir", True)
