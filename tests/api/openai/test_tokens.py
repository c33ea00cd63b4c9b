import pytest
from tests.api.live import application


def test_vllm_bodies_are_understood(api):
    answer = api.post("/tokenize", {"prompt": "the cat", "add_special_tokens": False, "return_token_strs": True}).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 256
    assert answer["token_strs"][0] == "the"


def test_llama_cpp_bodies_are_understood(api):
    plain = api.post("/tokenize", {"content": "the cat"}).json()["tokens"]
    pieces = api.post("/tokenize", {"content": "the é", "with_pieces": True}).json()["tokens"]
    assert plain == api.post("/tokenize", {"prompt": "the cat", "add_special_tokens": False}).json()["tokens"]
    assert pieces[0]["piece"] == "the"
    assert pieces[-2:][0]["piece"] == [0xC3]  # half a character has no text


def test_a_conversation_is_tokenised_as_the_model_would_see_it(api):
    messages = [{"role": "user", "content": "hello"}]
    tokens = api.post("/tokenize", {"messages": messages}).json()["tokens"]
    assert tokens == api.chat(messages=messages, return_token_ids=True).json()["prompt_token_ids"]


def test_tokens_become_text_under_both_names(api):
    tokens = api.post("/tokenize", {"prompt": "the cat<|im_end|>"}).json()["tokens"]
    assert api.post("/detokenize", {"tokens": tokens}).json() == {
        "prompt": "the cat<|im_end|>",
        "content": "the cat<|im_end|>",
    }


@pytest.mark.parametrize(("body", "param"), [({}, "prompt"), ({"prompt": 1}, "prompt"), ({"messages": []}, "messages")])
def test_nothing_to_tokenise_is_refused(api, body, param):
    answer = api.post("/tokenize", body)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_tokenizer_info_is_told_only_where_the_operator_allows_it(api, script_source):
    assert api.get("/tokenizer_info").status_code == 403
    with application(script_source, enable_tokenizer_info=True) as open_api:
        info = open_api.get("/tokenizer_info").json()
    assert info["eos_token"] == "<|im_end|>"
    assert "im_start" in info["chat_template"]
