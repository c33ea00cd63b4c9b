import pytest
from tests.api.conftest import ANSWER
from tests.api.live import application, frames

from sardonyx.api.openai.schemas import ChatCompletionRequest

USER = {"role": "user", "content": "hello"}


def prompt_of(api, answer):
    """The prompt that was made of the messages."""
    return api.post("/detokenize", {"tokens": answer["prompt_token_ids"]}).json()["content"]


def test_a_conversation_is_answered(api):
    answer = api.chat(messages=[{"role": "system", "content": "be brief"}, USER], return_token_ids=True).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": ANSWER, "refusal": None, "annotations": []}
    assert choice["finish_reason"] == "stop"
    assert prompt_of(api, answer) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_roles_and_parts_become_what_the_template_reads(api):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "a", "content": "42"},
        {"role": "assistant", "refusal": "no", "content": None},
        {"role": "user", "content": "why?", "name": "ann", "cache_control": {"type": "ephemeral"}},
    ]
    answer = api.chat(messages=messages, return_token_ids=True).json()
    text = prompt_of(api, answer)
    assert "<|im_start|>system\none\ntwo<|im_end|>" in text
    assert "<|im_start|>tool\n42<|im_end|>" in text
    assert "<|im_start|>assistant\nno<|im_end|>" in text


def test_every_choice_has_its_message(api):
    choices = api.chat(n=3).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]


def test_log_probabilities_come_in_the_newer_form(api):
    choice = api.chat(logprobs=True, top_logprobs=2, max_completion_tokens=2).json()["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 2
    assert content[0]["token"] == "the"
    assert bytes(content[0]["bytes"]) == b"the"
    assert content[0]["top_logprobs"][0]["logprob"] == content[0]["logprob"]
    assert choice["finish_reason"] == "length"
    assert api.chat(logprobs=True, max_tokens=1).json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_a_stream_has_the_role_first_and_the_reason_last(api):
    chunks = frames(api.chat(stream=True).text)
    assert chunks.pop() == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all("message" not in chunk["choices"][0] for chunk in chunks)


def test_a_stream_carries_every_log_probability(api):
    whole = api.chat(logprobs=True, top_logprobs=1).json()["choices"][0]["logprobs"]["content"]
    chunks = frames(api.chat(logprobs=True, top_logprobs=1, stream=True).text)[:-1]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [token for piece in pieces if piece for token in piece["content"]] == whole


def test_a_stream_carries_token_ids_when_asked_for(api):
    whole = api.chat(return_token_ids=True).json()
    chunks = [chunk["choices"][0] for chunk in frames(api.chat(return_token_ids=True, stream=True).text)[:-1]]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [token for chunk in chunks for token in chunk.get("token_ids", [])] == whole["choices"][0]["token_ids"]


def test_the_last_message_is_continued_when_asked_for(api):
    messages = [USER, {"role": "assistant", "content": "I say: "}]
    answer = api.chat(messages=messages, continue_final_message=True, return_token_ids=True).json()
    assert prompt_of(api, answer).endswith("<|im_start|>assistant\nI say: ")
    assert answer["choices"][0]["message"]["content"] == ANSWER
    echoed = api.chat(messages=messages, continue_final_message=True, echo=True).json()
    assert echoed["choices"][0]["message"]["content"] == "I say: " + ANSWER


@pytest.mark.parametrize("is_streamed", [False, True])
def test_continue_answers_with_the_whole_message(api, is_streamed):
    messages = [USER, {"role": "assistant", "content": [{"type": "text", "text": "I say: "}]}]
    answer = api.chat(messages=messages, continue_=True, stream=is_streamed)
    if is_streamed:
        deltas = [chunk["choices"][0]["delta"] for chunk in frames(answer.text)[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == "I say: " + ANSWER
    else:
        assert answer.json()["choices"][0]["message"]["content"] == "I say: " + ANSWER


def test_the_assistants_turn_is_left_out_when_asked_for(api):
    answer = api.chat(add_generation_prompt=False, return_token_ids=True).json()
    assert prompt_of(api, answer).endswith("hello<|im_end|>\n")


def test_prompt_log_probabilities_stand_beside_the_choices(api):
    answer = api.chat(prompt_logprobs=0, max_tokens=1, return_token_ids=True).json()
    assert len(answer["prompt_logprobs"]) == len(answer["prompt_token_ids"])


def test_an_answer_may_go_on_to_the_end_of_the_context(endless):
    for limit in ({}, {"max_tokens": -1}, {"max_completion_tokens": None, "max_tokens": None}):
        usage = endless.chat(**limit).json()["usage"]
        assert usage["total_tokens"] == 256


def test_tools_are_accepted_only_where_they_may_not_be_called(api):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert api.chat(tools=[tool], tool_choice="none").status_code == 200
    assert api.chat(tools=[], tool_choice="auto").status_code == 200
    for choice in (None, "auto", "required"):
        error = api.chat(tools=[tool], tool_choice=choice).json()["error"]
        assert error["param"] == "tools"
        assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [USER] * 2049}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages.0.content.0.type"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 5}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"continue_": True}, "continue_"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "add_generation_prompt"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_a_field_out_of_place_is_refused_by_name(api, body, param):
    answer = api.chat(**body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": ""}}]}]}, None),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"mode": "chat-instruct"}, "mode"),
        ({"character": "Assistant"}, "character"),
        ({"add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(api, body, param):
    answer = api.chat(**body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == "unsupported_parameter"
    assert error["param"].startswith(param or "messages.0.content.0")


def test_null_counts_as_absent_in_every_field(api):
    nulls = dict.fromkeys(ChatCompletionRequest.__struct_fields__)
    assert api.chat(**nulls | {"messages": [USER]}).status_code == 200


def test_a_model_without_a_template_refuses_chats(script_source):
    with application(script_source) as api:
        api.served.model.chat_template = None
        answer = api.chat()
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unsupported_parameter"
