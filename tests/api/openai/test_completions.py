import pytest
from tests.api.conftest import ANSWER
from tests.api.live import application, frames

from sardonyx.api.openai.schemas import CompletionRequest


def test_text_is_continued(api):
    answer = api.complete(prompt="hello").json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == "tiny"
    assert answer["choices"] == [
        {"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("prompt", "num_choices"),
    [("one", 1), (["one", "two"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8, 9, 10]], 3), (["one", [5, 6]], 2)],
)
def test_every_form_of_prompt_gives_a_choice_each(api, prompt, num_choices):
    choices = api.complete(prompt=prompt, n=2).json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(2 * num_choices))


@pytest.mark.parametrize("prompt", ["", [""], [[]]])
def test_an_empty_prompt_begins_a_text(api, prompt):
    answer = api.complete(prompt=prompt).json()
    assert answer["choices"][0]["text"] == ANSWER
    assert answer["usage"]["prompt_tokens"] == 1


@pytest.mark.parametrize(
    "prompt", [None, [], [1, "two"], [-1], {"text": "x"}, 3, [[1, "x"]], [[[1]]], [1.5], ["x"] * 2049, [[10**6]]]
)
def test_a_prompt_that_cannot_be_served_is_refused_by_name(api, prompt):
    answer = api.complete(prompt=prompt)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")


def test_max_tokens_defaults_to_16(endless):
    answer = endless.complete(prompt="hello").json()
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


def test_echo_begins_with_the_prompt(api):
    assert api.complete(prompt="hello ", echo=True).json()["choices"][0]["text"] == "hello " + ANSWER


def test_a_stop_string_is_cut_off_and_named(api):
    choice = api.complete(prompt="hello", stop=["sat", "zzz"]).json()["choices"][0]
    assert choice["text"] == "the cat "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "sat"


def test_log_probabilities_have_one_entry_for_each_token(api):
    answer = api.complete(prompt="hello", logprobs=2, max_tokens=4).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert {len(logprobs[key]) for key in logprobs} == {4}
    for token, logprob, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
    assert logprobs["text_offset"][0] == 0


def test_zero_log_probabilities_are_those_of_the_tokens_alone(api):
    logprobs = api.complete(prompt="hello", logprobs=0, max_tokens=2).json()["choices"][0]["logprobs"]
    assert [len(top) for top in logprobs["top_logprobs"]] == [1, 1]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_prompt_is_scored_as_lm_evaluation_harness_expects(api, is_streamed):
    """Exactly len(prompt) + 1 entries, the first null, in the order of the prompts."""
    body = {"prompt": [[5, 6, 7, 8], [9, 10]], "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    answer = api.complete(**body, echo=True, stream=is_streamed)
    choices = answer.json()["choices"] if not is_streamed else merged(frames(answer.text))
    for choice, length in zip(sorted(choices, key=lambda choice: choice["index"]), (5, 3), strict=True):
        logprobs = choice["logprobs"]
        assert {len(logprobs[key]) for key in logprobs} == {length}
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        for token, logprob, top in zip(*(logprobs[key][1:] for key in list(logprobs)[:3]), strict=True):
            assert top[token] == logprob == max(top.values())


def test_a_prompt_is_scored_without_generating(api):
    answer = api.complete(prompt=[5, 6, 7], max_tokens=0, echo=True, logprobs=1).json()
    choice = answer["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == 3
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_nothing_is_generated_when_nothing_is_asked_for(api):
    assert api.complete(prompt="hello", max_tokens=0).json()["choices"][0]["text"] == ""
    assert api.complete(prompt="hello", max_tokens=0, echo=True).json()["choices"][0]["text"] == "hello"


def test_a_stream_says_what_the_whole_answer_says(api):
    answer = api.complete(prompt="hello", stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = frames(answer.text)
    assert chunks.pop() == "[DONE]"
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "text_completion"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_choices_interleave_in_a_stream_and_each_ends_once(api):
    chunks = frames(api.complete(prompt=["a", "b"], n=2, stream=True).text)[:-1]
    texts = dict.fromkeys(range(4), "")
    ends = []
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        ends += [choice["index"]] if choice["finish_reason"] else []
    assert texts == dict.fromkeys(range(4), ANSWER)
    assert sorted(ends) == [0, 1, 2, 3]


def test_usage_comes_in_a_chunk_of_its_own_when_asked_for(api):
    chunks = frames(api.complete(prompt="hello", stream=True, stream_options={"include_usage": True}).text)[:-1]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == api.complete(prompt="hello").json()["usage"]["completion_tokens"]


def test_usage_grows_from_chunk_to_chunk_when_asked_for(api):
    options = {"continuous_usage_stats": True, "include_usage": True}
    chunks = frames(api.complete(prompt="hello", stream=True, stream_options=options).text)[:-1]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] > 0


def test_echo_comes_first_in_a_stream(api):
    chunks = frames(api.complete(prompt=["one ", "two "], echo=True, stream=True).text)[:-1]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == {0: "one " + ANSWER, 1: "two " + ANSWER}


def test_tokens_are_called_by_their_ids_when_asked_for(api):
    answer = api.complete(
        prompt="hello", logprobs=1, max_tokens=1, return_tokens_as_token_ids=True, return_token_ids=True
    ).json()["choices"][0]
    assert answer["logprobs"]["tokens"] == [f"token_id:{answer['token_ids'][0]}"]
    assert len(answer["prompt_token_ids"]) == 5


def test_prompt_log_probabilities_come_in_vllm_form(api):
    answer = api.complete(prompt=[5, 6], max_tokens=1, prompt_logprobs=1).json()["choices"][0]
    first, second = answer["prompt_logprobs"]
    assert first is None
    assert second["6"]["rank"] == 1
    assert set(second["6"]) == {"logprob", "rank", "decoded_token"}
    assert answer["logprobs"] is None


def test_the_best_of_several_choices_is_returned(api):
    assert len(api.complete(prompt="hello", n=1, best_of=3).json()["choices"]) == 1


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"n": 500}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
        ({"custom_token_bans": "1;2"}, "custom_token_bans"),
        ({"custom_token_bans": "100000"}, "custom_token_bans"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_length": 5, "max_tokens": 10}, "truncation_length"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"suffix": "the end"}, "suffix"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 10_000}, "prompt"),  # prompt and completion together
    ],
)
def test_a_field_out_of_place_is_refused_by_name(api, body, param):
    answer = api.complete(**{"prompt": "hello"} | body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_prompt_over_the_context_has_its_own_code(api):
    answer = api.complete(prompt=[5] * 300)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_null_counts_as_absent_in_every_field(api):
    nulls = dict.fromkeys(CompletionRequest.__struct_fields__)
    assert api.complete(**nulls | {"prompt": "hello"}).json()["choices"][0]["text"] == ANSWER


def test_unknown_fields_are_ignored(api):
    assert api.complete(prompt="hello", user="me", metadata={"a": [1]}, no_such_field=1).status_code == 200


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("grammar", "", "root ::= 'x'"),
        ("guided_json", None, {"type": "object"}),
        ("structured_outputs", {}, {"regex": "a+"}),
        ("mirostat_mode", 0, 2),
        ("tfs", 1, 0.9),
        ("num_beams", 1, 4),
        ("dynamic_temperature", False, True),
        ("bad_words", [], ["x"]),
        ("preset", "None", "Big O"),
    ],
)
def test_a_known_field_that_we_cannot_honour_is_refused_unless_neutral(api, field, neutral, other):
    assert api.complete(prompt="hello", **{field: neutral}).status_code == 200
    answer = api.complete(prompt="hello", **{field: other})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_generate_is_an_alias_with_older_names(api):
    answer = api.post("/v1/generate", {"context": "hello", "length": 3}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("is_streamed", [False, True])
def test_generate_appends_a_suffix_as_it_is(api, is_streamed):
    answer = api.post("/v1/generate", {"prompt": "hello", "suffix": "!", "stream": is_streamed})
    choices = answer.json()["choices"] if not is_streamed else merged(frames(answer.text))
    assert choices[0]["text"] == ANSWER + "!"


def test_the_model_of_an_engine_path_wins(api):
    assert api.post("/v1/engines/tiny/completions", {"prompt": "a", "model": "other"}).json()["model"] == "tiny"
    answer = api.post("/v1/engines/other/completions", {"prompt": "a"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", [None, "", "tiny", "gpt-3.5-turbo", "org/tiny"])
def test_a_model_is_found_by_name_alias_or_default(api, name):
    assert api.complete(prompt="hello", model=name).json()["model"] == "tiny"


def test_an_unknown_model_is_not_found(api):
    answer = api.complete(prompt="hello", model="gpt-5")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "model_not_found"
    assert "gpt-5" in error["message"]


def merged(chunks):
    """The choices of a stream, put together again."""
    choices = {}
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            whole = choices.setdefault(choice["index"], choice)
            if whole is not choice:
                whole["text"] += choice["text"]
                for key, values in (choice["logprobs"] or {}).items():
                    whole["logprobs"][key] += values
    return list(choices.values())


def test_a_gap_is_filled_by_a_model_that_has_tokens_for_it(script_source):
    with application(script_source) as api:
        api.served.model.tokenizer.token_id = lambda token: 1
        choice = api.complete(prompt="a", suffix="b", return_token_ids=True).json()["choices"][0]
        prompt = api.post("/detokenize", {"tokens": choice["prompt_token_ids"]}).json()["prompt"]
        assert prompt == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
        assert choice["text"] == ANSWER
        answer = api.complete(prompt="a", suffix="b", echo=True)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "echo"
