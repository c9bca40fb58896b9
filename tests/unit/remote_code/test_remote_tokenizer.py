"""The near side of a checkpoint's own tokenizer, as an engine or `LLM` uses it: waiting for its process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness import wait_for
from lightllmd import LLM
from lightllmd.errors import ConfigInvalid, ModelChanged, NotReady, RequestFailed
from lightllmd.text.remote import RemoteTokenizer
from remote_checkpoints import REFERENCE, TEMPLATE, TOKENIZER_CODE, remote_facts, write_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Iterator[RemoteTokenizer]:
    folder = write_tokenizer(tmp_path / "m")
    one = RemoteTokenizer(str(folder), REFERENCE, stamps=remote_facts(folder).stamps)
    yield one
    one.close()


def test_it_encodes_decodes_and_starts_again_when_it_is_needed(tokenizer: RemoteTokenizer, tmp_path: Path) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_ids, tokenizer.special_ids) == (257, [256], {256})
    assert tokenizer.encode("née") == [110, 233, 101]
    assert tokenizer.encode_batch(["a", "<end>"]) == [[97], [256]]
    assert tokenizer.decode([110, 233, 101, 256]) == "née"
    assert tokenizer.token_bytes(233) == "é".encode()
    assert tokenizer.encode_chat([{"role": "user", "content": "x"}]) == [*b"user=x;"]
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.source == TEMPLATE
    with pytest.raises(RequestFailed, match="KeyError: 'odd'"):
        tokenizer.encode("RAISE")
    for word in ("EXIT", "LEAVE"):
        with pytest.raises(NotReady, match="ended in the middle of a text"):
            tokenizer.encode(word)
        assert tokenizer.encode("a") == [97]
    tokenizer.close()
    assert tokenizer.decode([97]) == "a"  # needs no process
    assert tokenizer.encode("a") == [97]
    tokenizer.close()
    (tmp_path / "m" / "tokenization_odd.py").write_text("# another")
    with pytest.raises(ModelChanged, match=r"tokenization_odd\.py changed"):
        tokenizer.encode("a")


BACKWARDS = TOKENIZER_CODE.replace("for token in tokens", "for token in tokens[::-1]")


@pytest.mark.parametrize(
    ("code", "reference", "said"),
    [(TOKENIZER_CODE, "tokenization_odd.Other", "has no attribute"), (BACKWARDS, REFERENCE, "NotConcatenating")],
    ids=["no such class", "backwards"],
)
def test_one_that_can_not_be_used_is_refused_and_leaves_nothing(
    tmp_path: Path, code: str, reference: str, said: str
) -> None:
    folder = write_tokenizer(tmp_path / "m", code)
    with pytest.raises(ConfigInvalid, match=said):
        RemoteTokenizer(str(folder), reference)
    wait_for(lambda: not [one for one in psutil.Process().children() if "lightllmd.code_host" in one.cmdline()])


def test_an_llm_serves_it_with_the_switch_only(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m")
    settings = {"load_way": "DUMMY", "engine": {"device": "cpu", "threads": 1}, "max_total_token_num": 4000}
    settings |= {"max_req_input_len": 1000, "max_req_total_len": 2000}
    with pytest.raises(ConfigInvalid, match="which runs only with trust_remote_code = true"):
        LLM(folder, **settings)
    with LLM(folder, trust_remote_code=True, **settings) as llm:
        [output] = llm.generate(["née"], max_new_tokens=4)
        [again] = llm.generate(prompt_token_ids=[[110, 233, 101]], max_new_tokens=4)
        assert output.text == again.text
        assert {one.name: one.reason for one in llm.plan.derived}["tokenizer_mode"].startswith(
            f"the checkpoint's own {REFERENCE}"
        )


def test_none_of_its_code_or_transformers_gets_into_the_process_that_asks(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "m")
    asking = f"""
import sys
from lightllmd.text.remote import RemoteTokenizer
tokenizer = RemoteTokenizer({str(folder)!r}, {REFERENCE!r})
assert tokenizer.encode("ab") == [97, 98]
tokenizer.close()
print([name for name in sys.modules if "transformers" in name or "odd" in name or name == "torch"])
"""
    done = subprocess.run([sys.executable, "-c", asking], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
