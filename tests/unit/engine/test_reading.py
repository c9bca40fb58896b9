"""What a hypothesis says, however many beams share its past, is what its sequence would say by itself."""

from __future__ import annotations

import random

import pytest

from lightllmd.engine.scheduling.hypothesis_text import DetokenizedHypothesis, HypothesisTexts
from lightllmd.errors import ConfigInvalid, Problem
from lightllmd.ipc.messages import FINISH_NONE, SamplingParams, TextStops
from lightllmd.requests.branch import TextOptions, open_branches
from lightllmd.text import StopList, Tokenizer
from unit.text.test_detokenize import KINDS

OPTIONS = [
    TextOptions(StopList(["ab", "c"], [[3, 4]])),
    TextOptions(StopList(["b c"]), include_stop=False, min_tokens=4),
    TextOptions(StopList(["a<s>"]), skip_special_tokens=True, spaces_between_special_tokens=False),
    TextOptions(StopList(["the", "e"]), skip_special_tokens=False),
]


def opened(tokenizer: Tokenizer, options: TextOptions) -> DetokenizedHypothesis:
    params = SamplingParams(n=2, min_new_tokens=options.min_tokens, stops=options.for_search())
    reading = HypothesisTexts(lambda: tokenizer).open([1], params)
    assert reading is not None
    return reading


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: str(options.stops.strings))
@pytest.mark.parametrize("kind", KINDS)
def test_a_reading_stops_where_the_branch_of_the_same_tokens_does(kind: str, options: TextOptions) -> None:
    """HypothesisTexts of other continuations in between change nothing."""
    tokenizer, draw = KINDS[kind], random.Random(kind)
    for _ in range(20):
        tokens = draw.choices(range(tokenizer.vocab_size), k=12)
        (branch,) = open_branches(1, [1], options, tokenizer)
        reading = opened(tokenizer, options)
        for token in tokens:
            branch.take(token, 0.0, None, FINISH_NONE)
            reading.after(draw.randrange(tokenizer.vocab_size)).after(token)
            reading = reading.after(token)
            assert reading.stopped == (branch.finish == "stop")
            if reading.stopped:
                assert reading.text == branch.text
                break
            assert (reading.text or "").startswith(branch.text)


def test_stop_ids_need_no_tokenizer_and_without_one_no_stop_text_is_found() -> None:
    def none() -> Tokenizer:
        raise ConfigInvalid([Problem("model_dir", "has no tokenizer")])

    ids = HypothesisTexts(none).open([1], SamplingParams(n=2, stops=TextStops(ids=((5, 6), (9,)))))
    assert ids is not None
    assert [ids.after(9).stopped, ids.after(5).stopped, ids.after(5).after(6).stopped] == [True, False, True]
    assert ids.after(9).text is None
    text = HypothesisTexts(none).open([1], SamplingParams(n=2, stops=TextStops(strings=("a",), ids=((5,),))))
    assert text is not None
    assert (text.after(97).stopped, text.after(5).stopped) == (False, True)
    assert HypothesisTexts(none).open([1], SamplingParams(n=2)) is None
