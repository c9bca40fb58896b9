"""Pairs are joined in bounded time and memory, and what can't be joined is refused by the name of its field."""

from __future__ import annotations

from dataclasses import replace

import pytest

from api.frontend_harness import make_plan
from lightllmd.errors import InvalidRequest
from lightllmd.requests import limits
from lightllmd.requests.asked import FieldOfTexts, TextPairs
from lightllmd.requests.limits import RequestLimits
from lightllmd.requests.pair_encoding import PairEncoder
from lightllmd.text import ByteTokenizer, ChatTemplate
from lightllmd.text.pairs import NO_CUT, PairCut


class Counting(ByteTokenizer):
    """Remembers what it was given."""

    def __init__(self, template: str | None = None) -> None:
        super().__init__()
        self.encoded: list[str] = []
        if template is not None:
            self.chat_template = ChatTemplate({"score": template})

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        self.encoded.append(text)
        return super()._encode(text, add_special_tokens)


def joined(tokenizer: ByteTokenizer, *texts: tuple[str, str], cut: PairCut = NO_CUT, **plan: object) -> list[bytes]:
    encoder = PairEncoder(tokenizer, RequestLimits.of(make_plan(plan)))
    firsts, seconds = ([pair[at] for pair in texts] for at in (0, 1))
    pairs = TextPairs(
        FieldOfTexts("q", firsts[:1] if len({*firsts}) == 1 else firsts, listed=len({*firsts}) > 1),
        FieldOfTexts("d", seconds),
    )
    return [bytes(ids.tolist()) for ids in encoder.encode(pairs, cut)]


def test_a_text_of_many_pairs_is_tokenised_once():
    tokenizer = Counting()
    assert joined(tokenizer, ("q", "a"), ("q", "b"), ("q", "")) == [b"qa", b"qb", b"q"]
    assert sorted(tokenizer.encoded) == ["", "a", "b", "q"]


def test_long_documents_are_tokenised_a_few_at_a_time():
    texts = [("q", letter * 30_000) for letter in "abcdef"]
    plan = {"max_req_input_len": 40_000, "max_req_total_len": 50_000}
    assert joined(Counting(), *texts, **plan) == [b"q" + second.encode() for _, second in texts]


@pytest.mark.parametrize(
    ("texts", "field", "says"),
    [
        ([("q", "a"), ("q", "x" * 3000)], "d.1", "max_req_input_len = 2048"),
        ([("x" * 3000, "a")], "d.0", "max_req_input_len = 2048"),
        ([("x" * 100_000, "a")], "q", "max_req_input_len = 2048"),
        ([("q", "a"), ("q", "\ud800")], "d.1", "lone surrogate"),
        ([("\ud800", "a")], "q", "lone surrogate"),
        ([("q", "a"), ("", "")], "d.1", "has no tokens"),
    ],
)
def test_what_can_not_be_joined_names_its_field(texts, field, says):
    with pytest.raises(InvalidRequest, match=says) as refused:
        joined(ByteTokenizer(), *texts)
    assert refused.value.parameters["param"] == field


def test_the_tokens_of_all_pairs_are_bounded_before_they_are_made(monkeypatch):
    monkeypatch.setattr(limits, "MAX_PAIRED", 1000)
    tokenizer = Counting()
    with pytest.raises(InvalidRequest, match=r"d\.4: with this one the pairs have 1005 tokens, more than 1000"):
        joined(tokenizer, *[("x" * 200, str(number)) for number in range(9)])


def test_cuts_apply_to_each_text_and_to_both():
    assert joined(ByteTokenizer(), ("abcd", "efgh"), cut=PairCut(first=1, second=2)) == [b"aef"]
    assert joined(ByteTokenizer(), ("abcd", "efgh"), cut=PairCut(both=5)) == [b"abefg"]
    assert joined(ByteTokenizer(), ("a", "b" * 50), cut=PairCut(both=-1), max_req_input_len=20) == [b"a" + b"b" * 19]
    assert joined(ByteTokenizer(), ("abcd", "efgh"), cut=PairCut(first=1, second=2, from_left=True)) == [b"dgh"]


@pytest.mark.parametrize("template", [None, "{{ messages[0].content }}{{ messages[1].content }}"])
@pytest.mark.parametrize("from_left", [False, True])
def test_of_a_long_text_no_more_is_tokenised_than_may_be_kept(template, from_left):
    tokenizer = Counting(template)
    text = "a" * 5 + "x" * 10_000_000 + "b" * 5
    cut = PairCut(second=5, from_left=from_left)
    assert joined(tokenizer, ("q", text), cut=cut) == [b"qbbbbb" if from_left else b"qaaaaa"]
    cut = PairCut(both=6, from_left=from_left)
    # A template's prompt is cut as a whole.
    kept = (b"xbbbbb" if template else b"qbbbbb") if from_left else b"qaaaaa"
    assert joined(tokenizer, ("q", text), cut=cut) == [kept]
    assert max(map(len, tokenizer.encoded)) <= 1 << 16


def test_the_models_template_joins_pairs():
    tokenizer = Counting("<{{ messages[0].content }}|{{ messages[1].content }}>")
    assert joined(tokenizer, ("abc", "def"), ("abc", "")) == [b"<abc|def>", b"<abc|>"]
    assert joined(tokenizer, ("abc", "def"), cut=PairCut(first=1, second=2)) == [b"<a|de>"]
    assert joined(tokenizer, ("abc", "def"), cut=PairCut(first=1, second=0, from_left=True)) == [b"<c|>"]
    assert joined(tokenizer, ("abc", "def"), cut=PairCut(both=4)) == [b"<abc"]


def test_a_template_that_refuses_names_the_document():
    tokenizer = Counting("{% if not messages[1].content %}{{ raise_exception('empty') }}{% endif %}x")
    with pytest.raises(InvalidRequest, match=r"d\.1: the model's chat template refuses them: empty") as refused:
        joined(tokenizer, ("a", "b"), ("a", ""))
    assert refused.value.parameters["param"] == "d.1"


def test_a_template_that_vllm_has_for_qwen3_takes_an_instruction():
    """Roles are selected, and an instruction that is not there is replaced."""
    source = (
        "{{ instruction | default('fits?', true) }} "
        "{{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}: "
        "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    )
    tokenizer = Counting()
    tokenizer.chat_template = ChatTemplate(source)
    encoder = PairEncoder(tokenizer, RequestLimits.of(make_plan()))
    pairs = TextPairs(FieldOfTexts("q", ["a"], listed=False), FieldOfTexts("d", ["b"]))
    assert [bytes(ids.tolist()) for ids in encoder.encode(pairs, NO_CUT)] == [b"fits? a: b"]
    pairs = replace(pairs, variables={"instruction": "rhymes?"}, variables_field="instruction")
    assert [bytes(ids.tolist()) for ids in encoder.encode(pairs, NO_CUT)] == [b"rhymes? a: b"]
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="instruction: this model has no chat template for pairs"):
        encoder.encode(pairs, NO_CUT)
