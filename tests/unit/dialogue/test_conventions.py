"""Which format a chat template writes, what of a dialogue reaches the template, and what of an output the parser."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialogue_outputs import TOOLS
from lightllmd.config.tables import HttpSettings
from lightllmd.dialogue.conventions import Conventions
from lightllmd.dialogue.registry import FORMATS
from lightllmd.dialogue.tools import Dialogue, ToolChoice
from lightllmd.errors import InvalidRequest
from lightllmd.requests.branch import TextOptions, open_branches
from lightllmd.text.chat_template import ChatTemplate
from lightllmd.text.tokenizer import ByteTokenizer
from lightllmd.text.vocabulary import Vocabulary

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=4), inner, max_size=2)),
    max_leaves=4,
)
CALLS = [
    {"id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}} for name in "fg"
]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "call_f", "content": "1"},
    {"role": "tool", "tool_call_id": "call_g", "content": "2"},
]


def test_every_format_can_be_configured():
    (words, *_) = get_args(get_type_hints(HttpSettings, include_extras=True)["tool_parser"])
    assert get_args(words) == ("auto", *FORMATS)


def test_a_configured_format_goes_before_the_template_s():
    template = ChatTemplate("{% if tools %}<tool_call>{% endif %}")
    assert Conventions(template).format.name == "hermes"
    assert Conventions(template, tool_parser="pythonic").format.name == "pythonic"
    # Without tools in it a template writes no format of calls, whatever stands in it.
    assert Conventions(ChatTemplate("[TOOL_CALLS] {{ messages }}")).format.name == "hermes"
    assert Conventions(None).format.name == "hermes"


@pytest.mark.parametrize(
    ("source", "effort", "given", "known"),
    [
        ("{{ reasoning_effort }}", "high", {}, {"reasoning_effort": "high"}),
        ("{{ messages }}", "high", {}, {}),
        ("{{ enable_thinking }}", "none", {}, {"enable_thinking": False}),
        ("{{ thinking }}", "none", {"x": 1}, {"thinking": False, "x": 1}),
        ("{{ enable_thinking }}", "none", {"enable_thinking": True}, {"enable_thinking": True}),
        ("{{ enable_thinking }}", "low", {}, {}),
    ],
)
def test_how_much_it_shall_think_is_told_by_the_names_that_the_template_knows(source, effort, given, known):
    prepared = Conventions(ChatTemplate(source)).prepare([], {"variables": given}, Dialogue(effort=effort))
    assert prepared.options["variables"] == known


def test_the_tools_that_may_be_called_are_shown():
    made = Conventions(ChatTemplate("{{ tools }}"))
    for choice, shown in (
        (ToolChoice(), ["get_weather", "now"]),
        (ToolChoice("required", ("now",)), ["now"]),
        (ToolChoice("none"), []),
    ):
        options = made.prepare([], {}, Dialogue(TOOLS, choice)).options
        assert [tool["function"]["name"] for tool in options.get("tools", [])] == shown


def test_a_parser_gets_special_tokens_that_are_marks_and_no_others():
    tokens: list[str | None] = ["a", "[TOOL_CALLS]", "[ARGS]", "<pad>", "</s>", "[THINK]", "[/THINK]"]
    special = frozenset(range(1, 7))
    tokenizer = ByteTokenizer()
    tokenizer.vocabulary = Vocabulary(tokens, special, special, texts=list(tokens))
    tokenizer.eos_ids = [4]
    made = Conventions(ChatTemplate("{{ tools }}[TOOL_CALLS][ARGS][/THINK]"))
    for tools, shown in ((TOOLS, "a[TOOL_CALLS][ARGS][THINK][/THINK]"), ([], "a[THINK][/THINK]")):
        prepared = made.prepare([], {}, Dialogue(tools))
        options = TextOptions(marks=prepared.marks, spaces_between_special_tokens=False)
        (branch,) = open_branches(1, [], options, tokenizer)
        for token in range(7):
            branch.take(token, 0.0, None)
        assert branch.text == shown


def test_reasoning_begins_where_the_prompt_ends_within_it():
    made = Conventions(ChatTemplate("{{ messages }}<think></think>"))
    prepared = made.prepare([], {}, Dialogue())
    for end, reasoning in (("assistant\n<think>\n", True), ("<think>\n\n</think>\n\n", False), ("", False)):
        parsers = prepared.parsers(end)
        assert parsers is not None
        assert parsers().reasoning == reasoning
    assert made.prepare([], {}, Dialogue(reasoning=False)).parsers("<think>") is None
    assert Conventions(ChatTemplate("{{ messages }}")).prepare([], {}, Dialogue()).parsers("") is None


def test_templates_get_calls_as_they_take_them():
    listed = (
        "{% for m in messages %}{{ m.role }}:{% for c in m.tool_calls or [] %}CALL;{% endfor %}"
        "{{ m.content }}|{% endfor %}"
    )

    # Qwen3's look into the content.
    content = "{{ tools }}" + listed.replace(
        "CALL", "{{ c.function.arguments.a + 1 }}{% if '</think>' in m.content %}{% endif %}"
    )
    assert "|assistant:2;2;|" in ChatTemplate(content).render(CALLED)

    # DeepSeek's put texts together.
    texts = "{{ tools }}" + listed.replace("CALL", "{{ c['function']['name'] + c['function']['arguments'] }}")
    assert '|assistant:f{"a": 1};g{"a": 1};|' in ChatTemplate(texts).render(CALLED)
    objects = "{{ tools }}" + listed.replace("CALL", "{{ c.function.arguments.a + 1 }}")
    assert "|assistant:2;2;None|" in ChatTemplate(objects).render(CALLED)

    # Mistral's have short ids, which call and result share.
    short = "[TOOL_CALLS]{{ tools }}" + listed.replace("CALL", "{{ c.id }}").replace(
        "{{ m.content }}", "{{ m.tool_call_id }}"
    )
    ids = [part.split(":")[1] for part in ChatTemplate(short).render(CALLED).split("|")[1:4]]
    called = [one for one in ids[0].split(";") if one]
    assert called == ids[1:]
    assert all(len(one) == 9 and one.isalnum() for one in called)

    # Llama 3's have one call and its result behind it.
    single = (
        "{{ tools }}{% for m in messages %}{% if m.tool_calls and m.tool_calls|length != 1 %}"
        '{{ raise_exception("only supports single tool-calls at once!") }}{% endif %}{% endfor %}'
    ) + listed.replace("CALL", "{{ c.function.name }}")
    assert ChatTemplate(single).render(CALLED).endswith("assistant:f;None|tool:1|assistant:g;None|tool:2|")


CALL = st.fixed_dictionaries({"function": st.one_of(JSON, st.just({"name": "f"}))}, optional={"id": JSON})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system"])},
    optional={"content": JSON, "tool_calls": st.one_of(JSON, st.lists(CALL)), "tool_call_id": JSON},
)


@given(st.lists(MESSAGE, max_size=4))
@settings(max_examples=50, deadline=None)
def test_messages_of_any_shape_are_rendered_or_refused(messages):
    strict = "{{ tools }}[TOOL_CALLS] single tool-calls at once{{ messages[0].tool_calls + 1 }}"
    for source in ("{{ messages }}", strict):
        try:
            text = ChatTemplate(source).render(messages, tools=[{"type": "function"}])
        except InvalidRequest as refused:
            text = str(refused)
        assert text
