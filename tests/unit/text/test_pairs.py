"""Two texts become one prompt as transformers' tokenizers make it, whole and cut, or as the model's template says."""

from __future__ import annotations

from itertools import product

import pytest

from lightllmd.errors import InvalidRequest
from lightllmd.text import ByteTokenizer, ChatTemplate, open_tokenizer
from lightllmd.text.pairs import PairCut, PairFrame
from pair_tokenizers import FRAMES, write_tokenizer

TEXTS = ["", "a", "hello world", "hello world " * 4, "\u00fcber \u6c49"]


@pytest.mark.parametrize("family", FRAMES)
def test_pairs_have_the_tokens_of_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, FRAMES[family])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    ours = open_tokenizer(folder)
    frame = ours.pair_frame
    for first, second in product(TEXTS, TEXTS):
        parts = [ours.encode(text, add_special_tokens=False) for text in (first, second)]
        assert frame.join(*parts) == theirs([first], [second])["input_ids"][0]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FRAMES)
def test_a_pair_is_cut_as_transformers_cuts_the_longest_first(tmp_path, family, side):
    transformers = pytest.importorskip("transformers")
    folder = write_tokenizer(tmp_path, FRAMES[family])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), truncation_side=side)
    ours = open_tokenizer(folder)
    frame = ours.pair_frame
    for first, second, most in product(TEXTS, TEXTS, (4, 5, 8, 13, 100)):
        parts = [ours.encode(text, add_special_tokens=False) for text in (first, second)]
        cut = PairCut(both=most, from_left=side == "left")
        expected = theirs([first], [second], truncation="longest_first", max_length=most)["input_ids"][0]
        assert frame.join(*cut.apply(*parts, frame.size)) == expected, (first, second, most)


def test_each_text_is_cut_by_itself():
    first, second = [1, 2, 3], [4, 5, 6]
    assert PairCut(first=2).apply(first, second, 0) == ([1, 2], second)
    assert PairCut(second=1, from_left=True).apply(first, second, 0) == (first, [6])
    assert PairCut(first=0, second=0).apply(first, second, 0) == ([], [])
    assert PairCut(first=2, both=4).apply(first, second, 1) == ([1], [4, 5])
    assert PairFrame([9], [8], [7]).join([1], []) == [9, 1, 8, 7]
    assert (PairCut().most(None), PairCut(both=4).most(None), PairCut(both=4).most(3)) == (None, 4, 3)
    assert ByteTokenizer().pair_frame.size == 0


JINJA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'query' %}Q {{ m.content }} "
    '{% elif m.role == "document" %}D {{ m.content }}{% endif %}{% endfor %}'
)


def test_a_template_that_knows_both_roles_joins_pairs():
    template = ChatTemplate(JINJA, {"bos_token": "<s>"})
    assert template.joins_pairs
    assert template.render_pair("{{ 1 }}", "b", field="documents") == "<s>Q {{ 1 }} D b"
    assert not ChatTemplate("{{ messages[0].content }} query document").joins_pairs


@pytest.mark.parametrize("name", ["score", "rerank"])
def test_a_template_of_that_name_joins_pairs(name):
    plain = "{{ messages[0].content }}"
    template = ChatTemplate({"default": plain, name: "{{ messages[1].content }}|{{ messages[0].content }}"})
    assert template.render_pair("a", "b", field="x") == "b|a"
    assert template.render([{"role": "user", "content": "hi"}]) == "hi"
    only = ChatTemplate({name: plain})
    assert only.joins_pairs
    with pytest.raises(InvalidRequest, match="only chat template is for a query and a document"):
        only.render([{"role": "user", "content": "hi"}])


def test_what_a_template_refuses_names_the_field():
    template = ChatTemplate({"score": "{{ raise_exception('too blue') }}"})
    with pytest.raises(InvalidRequest, match=r"documents\.3: the model's chat template refuses them: too blue"):
        template.render_pair("a", "b", field="documents.3")
