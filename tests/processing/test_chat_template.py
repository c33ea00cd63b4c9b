import datetime
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.errors import ConfigError, InvalidRequest, UnsupportedFeature
from sardonyx.processing.chat_messages import ChatLimits
from sardonyx.processing.chat_template import ChatTemplate

HERE = Path(__file__).parent
GOLDEN: list[dict[str, Any]] = json.loads((HERE / "golden_chat.json").read_text(encoding="utf-8"))
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
NAMES = [f"{n}-{case['template']}" for n, case in enumerate(GOLDEN)]
USER = {"role": "user", "content": "Hello"}


def load(name: str, **options: Any) -> ChatTemplate:
    source = (HERE / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(source, special_tokens=SPECIAL_TOKENS, **options)


def split_options(options: dict[str, Any]) -> dict[str, Any]:
    """transformers takes variables among its keywords, ours apart."""
    own = {"add_generation_prompt", "continue_final_message", "tools"}
    variables = {name: value for name, value in options.items() if name not in own}
    return {name: value for name, value in options.items() if name in own} | {"variables": variables}


@pytest.mark.parametrize("case", GOLDEN, ids=NAMES)
def test_rendered_text_is_the_golden_one(case: dict[str, Any]) -> None:
    before = json.dumps(case)
    assert load(case["template"]).render(case["messages"], **split_options(case["options"])) == case["text"]
    assert json.dumps(case) == before


@pytest.mark.parametrize("case", GOLDEN, ids=NAMES)
def test_golden_text_is_what_transformers_renders(case: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)
    options = {"add_generation_prompt": True} | case["options"]
    template = load(case["template"]).source
    text = reference.apply_chat_template(case["messages"], chat_template=template, tokenize=False, **options)
    assert text == case["text"]


def test_parts_are_joined_for_a_template_that_reads_strings() -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    text = load("mistral").render([{"role": "user", "content": parts}])
    assert text == "<s>[INST] One\nTwo [/INST]"


def test_string_is_made_a_part_for_a_template_that_reads_parts_only() -> None:
    assert load("parts_only").render([USER]) == "<|im_start|>User: Hello<end_of_utterance>\nAssistant:"


@pytest.mark.parametrize(
    ("name", "reads_strings", "reads_parts"),
    [
        ("chatml", True, False),
        ("llama3", True, False),
        ("mistral", True, False),
        ("gemma", True, True),
        ("phi3", True, False),
        ("hermes_tools", True, False),
        ("parts_only", False, True),
        ("vicuna", True, False),
    ],
)
def test_form_of_content_is_recognised(name: str, reads_strings: bool, reads_parts: bool) -> None:
    traits = load(name).traits
    assert (traits.reads_strings, traits.reads_parts) == (reads_strings, reads_parts)


def test_part_that_is_no_text_is_not_supported() -> None:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(UnsupportedFeature) as error:
        load("chatml").render([USER, {"role": "user", "content": parts}])
    assert error.value.param == "messages.1.content.1.type"


def test_tool_arguments_sent_as_text_become_an_object() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, "é"]}'}}
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    text = load("hermes_tools").render(messages, add_generation_prompt=False)
    assert '{"name": "f", "arguments": {"x": [1, "é"]}}' in text
    assert call["function"] == {"name": "f", "arguments": '{"x": [1, "é"]}'}


@pytest.mark.parametrize("arguments", ["{", '{"a": 1} x', "[" * 5_000 + "]" * 5_000])
def test_tool_arguments_that_are_no_json_are_refused(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    with pytest.raises(InvalidRequest) as error:
        load("hermes_tools").render([{"role": "assistant", "tool_calls": [call]}])
    assert error.value.param == "messages.0.tool_calls.0.function.arguments"


def test_missing_content_is_empty_where_a_template_knows_no_tool_calls() -> None:
    text = load("chatml").render([USER, {"role": "assistant", "content": None, "tool_calls": []}])
    assert "<|im_start|>assistant\n<|im_end|>" in text


def test_developer_is_system_for_a_template_that_does_not_know_it() -> None:
    text = load("chatml").render([{"role": "developer", "content": "Be brief."}, USER])
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    knowing = ChatTemplate("{% for m in messages %}{{ 'D' if m.role == 'developer' }}{% endfor %}")
    assert knowing.render([{"role": "developer", "content": "x"}]) == "D"


@pytest.mark.parametrize("role", ["end", "im_end|>", "narrator", "", None, 3])
def test_role_that_the_template_does_not_name_is_refused(role: object) -> None:
    with pytest.raises(InvalidRequest) as error:
        load("phi3").render([{"role": role, "content": "x"}])
    assert error.value.param == "messages.0.role"


def test_role_that_the_template_names_is_taken() -> None:
    assert "ipython" in load("llama3").render([USER, {"role": "ipython", "content": "1"}])


def test_refusal_of_the_template_is_told_in_its_words() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as error:
        load("mistral").render([USER, USER])
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].nothing.more }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[5].content }}",
        "{{ [].append(1) }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages|attr('__class__')|string ~ cycler.__init__.__globals__.os }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{% include 'x' %}",
        "{{ lipsum() }}",
        "{{ range(10000000)|list }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%99999999999d' % 1 }}",
    ],
)
def test_template_that_fails_says_nothing_about_its_insides(source: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(source).render([USER])
    assert error.value.message == "messages: this model's chat template cannot write them"


def test_wrong_template_is_named_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"my\.jinja: line 2") as error:
        ChatTemplate("{{ messages }}\n{% if %}", file="my.jinja")
    assert error.value.file == "my.jinja"


def test_variables_are_those_that_the_template_reads() -> None:
    template = load("hermes_tools")
    assert template.variables == {"enable_thinking"}
    assert load("llama3").variables == {"date_string"}
    unread = {"date_string": "x", "tokenize": True}
    assert template.render([USER], variables=unread) == template.render([USER])


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "raise_exception", "continue_final_message"]
)
def test_variable_that_is_not_the_callers_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name) as error:
        load("llama3").render([USER], variables={name: "x"})
    assert error.value.param == "chat_template_kwargs"


def test_date_comes_from_the_clock() -> None:
    clock = datetime.datetime(2026, 11, 23)
    assert "Today Date: 23 Nov 2026\n" in load("llama3", now=lambda: clock).render([USER])


def test_json_is_written_for_a_model_and_not_for_html() -> None:
    template = ChatTemplate("{{ messages[0].content|tojson }}{{ {'b': 1, 'a': 2}|tojson(indent=1, sort_keys=true) }}")
    assert template.render([{"role": "user", "content": "<é> & 'x'"}]) == '"<é> & \'x\'"{\n "a": 2,\n "b": 1\n}'


@given(st.text(max_size=40))
def test_open_message_ends_with_its_own_text(content: str) -> None:
    text = load("chatml").render([USER, {"role": "assistant", "content": content}], continue_final_message=True)
    kept = "".join(char for char in content if char not in "\ufdd0\ufdd1\ufdd2")
    assert text.endswith("<|im_start|>assistant\n" + kept)


def test_open_message_that_the_template_drops_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="cannot be continued"):
        ChatTemplate("{{ messages[0].content }}").render([USER, USER], continue_final_message=True)
    with pytest.raises(InvalidRequest, match="no text to continue"):
        load("hermes_tools").render([{"role": "assistant", "tool_calls": []}], continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (["x"], "messages.0"),
        ([{"role": "user", "content": 5}], "messages.0.content"),
        ([{"role": "user", "content": [5]}], "messages.0.content.0"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ([{"role": "user", "content": {"a": 1}}], "messages.0.content"),
        ([{"role": "user", "content": "x", "tool_calls": "f"}], "messages.0.tool_calls"),
        ([{"role": "user", "content": "x", 1: "f"}], "messages.0"),
        ([{"role": "user", "content": b"x"}], "messages.0"),
    ],
)
def test_wrong_shape_is_named(messages: list[Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        load("hermes_tools").render(messages)
    assert error.value.param == param


def test_what_is_over_a_limit_is_refused() -> None:
    limits = ChatLimits(max_messages=2, max_tools=1, max_chars=100, max_depth=4)
    template = load("llama3", limits=limits)
    deep: Any = "x"
    for _ in range(5):
        deep = [deep]
    for messages, tools, param in [
        ([USER] * 3, None, "messages"),
        ([USER], [{}, {}], "tools"),
        ([{"role": "user", "content": "x" * 100}], None, "messages.0"),
        ([USER | {"extra": deep}], None, "messages.0"),
        ([USER], [{"deep": deep}], "tools.0"),
        ([USER | {"extra": [None] * 100}], None, "messages.0"),
    ]:
        with pytest.raises(InvalidRequest) as error:
            template.render(messages, tools=tools)
        assert error.value.param == param


def test_rendered_text_over_its_limit_is_refused_before_it_is_whole() -> None:
    source = "{% for i in range(99999) %}{% for j in range(99999) %}{{ messages[0].content }}{% endfor %}{% endfor %}"
    with pytest.raises(InvalidRequest, match="more than 1,000 characters"):
        ChatTemplate(source, limits=ChatLimits(max_chars=1_000)).render([USER])


def test_the_most_messages_render_in_time() -> None:
    messages = [USER, {"role": "assistant", "content": "Yes"}] * 1024
    start = time.process_time()
    for name in ("chatml", "hermes_tools", "mistral"):
        load(name).render(messages)
    assert time.process_time() - start < 5
