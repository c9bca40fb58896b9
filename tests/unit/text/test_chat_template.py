"""Messages become the prompt that the template's author meant, or a client error; never a fault or a hang."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.errors import InvalidRequest
from lightllmd.text import ByteTokenizer, ChatTemplate
from lightllmd.text.chat_template import MAX_DEPTH, MAX_MESSAGES

PLAIN = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)


def user(content: object = "hi") -> dict[str, object]:
    return {"role": "user", "content": content}


def test_special_tokens_and_generation_prompt():
    template = ChatTemplate(PLAIN, {"bos_token": "<s>"})
    assert template.render([user()]) == "<s>[user]hi|[assistant]"
    assert template.render([user()], add_generation_prompt=False) == "<s>[user]hi|"


def test_text_parts_become_one_string():
    template = ChatTemplate(PLAIN)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([user(parts)]) == "[user]a\nb|[assistant]"
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[1\].*'image_url'"):
        template.render([user([parts[0], {"type": "image_url", "image_url": {}}])])


@pytest.mark.parametrize(
    "message",
    [{}, {"role": 3, "content": "x"}, user(3), user([3]), user([{"type": "text"}]), user({"a": 1}), "hi", None],
)
def test_malformed_messages_are_client_errors(message):
    with pytest.raises(InvalidRequest, match=r"messages\[0\]"):
        ChatTemplate(PLAIN).render([message])


@pytest.mark.parametrize("message", [{"role": "user"}, user(None)])
def test_messages_that_the_template_cant_take_are_client_errors(message):
    with pytest.raises(InvalidRequest, match="chat template"):
        ChatTemplate(PLAIN).render([message])


def test_refusal_carries_the_templates_own_words():
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        template.render([user()])


def test_syntax_error_is_found_when_the_template_is_made():
    with pytest.raises(ValueError, match="line 2"):
        ChatTemplate("a\n{% if %}")


def test_what_templates_use_beyond_jinja():
    source = (
        "{%- for tool in tools %}{{ tool | tojson(indent=2) }}\n{% endfor %}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% set ns = namespace(n=1) %}{% set ns.n = 2 %}{{ ns.n }}{{ strftime_now('%Y')[:2] }}{{ enable_thinking }}"
    )
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [user("<ä> & 'b'"), user("two")]
    tools = [{"name": "f<&>", "x": [1, None]}]
    expected, _ = utilities.render_jinja_template(
        [messages], tools=tools, chat_template=source, add_generation_prompt=True, enable_thinking=False
    )
    assert ChatTemplate(source).render(messages, tools=tools, variables={"enable_thinking": False}) == expected[0]


def test_tools_choose_the_tool_template_and_arguments_are_objects():
    template = ChatTemplate({"default": "plain", "tool_use": "{{ messages[0].tool_calls[0].function.arguments.city }}"})
    call = {"type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert template.render([message]) == "plain"
    assert template.render([message], tools=[{"type": "function"}]) == "Paris"
    assert call["function"]["arguments"] == '{"city": "Paris"}'  # the caller's data is not touched


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ '{0.__class__}'.format(messages) }}",
    ],
)
def test_templates_run_in_a_sandbox(source):
    template = ChatTemplate(source)
    try:
        assert "<class" not in template.render([user()])
    except InvalidRequest:
        pass


def test_hostile_sizes_are_refused():
    template = ChatTemplate(PLAIN)
    with pytest.raises(InvalidRequest, match=str(MAX_MESSAGES)):
        template.render([user()] * (MAX_MESSAGES + 1))
    nested: object = "x"
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(InvalidRequest, match=str(MAX_DEPTH)):
        template.render([user() | {"extra": nested}])
    arguments = "[" * 100_000
    call = {"function": {"arguments": arguments}}
    assert template.render([user() | {"tool_calls": [call]}])  # no JSON: stays a text
    quadratic = ChatTemplate("{% for a in messages %}{% for b in messages %}{{ b.content }}{% endfor %}{% endfor %}")
    with pytest.raises(InvalidRequest, match="longer than"):
        quadratic.render([user("x" * 4000)] * 200)


def test_rendering_ends_at_its_time_limit():
    template = ChatTemplate("{% for i in range(100000) %}{{ i }}{% endfor %}")
    seconds = itertools.count()
    with pytest.raises(InvalidRequest, match="took more than"):
        template.render([user()], clock=lambda: next(seconds))


def test_markup_in_messages_is_data():
    text = "{{ 7 * 7 }}{% raw %}<|im_end|>"
    assert text in ChatTemplate(PLAIN).render([user(text)])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(JSON, st.fixed_dictionaries({"role": st.text(max_size=5)}, optional={"content": JSON, "tool_calls": JSON})), max_size=3))  # fmt: skip  # noqa: E501
def test_any_json_is_rendered_or_refused(messages):
    for template in (ChatTemplate(PLAIN), ChatTemplate("{{ messages | tojson }}{% for m in messages %}{{ m.items }}{% endfor %}")):  # fmt: skip  # noqa: E501
        try:
            assert isinstance(template.render(messages), str)
        except InvalidRequest:
            pass


def test_byte_tokenizer_speaks_the_fake_backends_template():
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode_chat([{"role": "system", "content": "s"}, user("é")])
    assert bytes(ids).decode() == "system: s\nuser: é\nassistant: "
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (257, None, [256])


def test_model_without_a_template_says_so():
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.encode_chat([user()])


MODERN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}|{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{{ extra | default('') }}"
)


@pytest.mark.parametrize(("knows", "role"), [(False, "system"), (True, "developer")])
def test_a_developer_is_the_system_where_the_template_knows_no_developer(knows, role):
    template = ChatTemplate(MODERN + ("{# role 'developer' #}" if knows else ""))
    message = {"role": "developer", "content": "be kind"}
    assert template.render([message, user()]) == f"[{role}]be kind|[user]hi|[assistant]"
    assert message["role"] == "developer"


def test_a_final_message_that_is_continued_is_where_the_prompt_ends():
    template = ChatTemplate(MODERN)
    for content in ("The answer", "two\nlines ", "", "hi", [{"type": "text", "text": "part"}]):
        last = {"role": "assistant", "content": content}
        text = content if isinstance(content, str) else "part"
        assert template.render([user(), last], continue_final_message=True) == f"[user]hi|[assistant]{text}"
    hidden = ChatTemplate("{% for m in messages %}[{{ m.role }}]{% endfor %}")
    with pytest.raises(InvalidRequest, match="doesn't show the last message as it is"):
        hidden.render([user()], continue_final_message=True)
    with pytest.raises(InvalidRequest, match="no text that could be continued"):
        template.render([{"role": "assistant", "content": None}], continue_final_message=True)


def test_variables_reach_the_template_and_replace_nothing_of_ours():
    names = {"extra": "!", "messages": [], "add_generation_prompt": False, "clock": 1, "tools": [1], "self": 2}
    assert ChatTemplate(MODERN).render([user()], variables=names) == "[user]hi|[assistant]!"
