"""What lm-evaluation-harness asks and how it reads the answers (`reference/api.md` 3.3), without the harness."""

import math

import pytest


@pytest.fixture(scope="module")
def tokenize(server):
    def call(text):
        body = {"prompt": text, "add_special_tokens": False}
        return server.request("POST", "/tokenize", body)[1]["tokens"]

    return call


def loglikelihood(server, *prompts):
    """The request of `LocalCompletionsAPI`, and its reading of the choices."""
    body = {"model": "tiny", "prompt": list(prompts), "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234}
    status, answer = server.request("POST", "/v1/completions", body | {"echo": True}, Authorization="Bearer ")
    assert status == 200
    return [choice["logprobs"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]


def test_the_probe_at_the_start_finds_a_remote_tokenizer(server, tokenize):
    status, info = server.request("GET", "/tokenizer_info")
    assert status == 200
    assert info["eos_token"] == "<|im_end|>"
    assert isinstance(info["chat_template"], str)
    tokens = tokenize("test")
    assert server.request("POST", "/detokenize", {"tokens": tokens})[1]["prompt"] == "test"


def test_every_prompt_has_one_entry_a_token_and_one_more(server, tokenize):
    prompts = [tokenize("the cat sat on"), tokenize("a"), tokenize("you and they have that one " * 60)]
    for prompt, logprobs in zip(prompts, loglikelihood(server, *prompts), strict=True):
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["token_logprobs"][0] is None
        rest = list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[1:]
        for logprob, top in rest:
            assert math.isfinite(logprob)
            assert logprob <= max(top.values())
            assert 1 <= len(top) <= 2
            assert logprob in top.values()


def test_a_batch_scores_as_its_prompts_alone(server, tokenize):
    """The tiny model is fp32: what stands beside a prompt changes its numbers by rounding only."""
    prompts = [tokenize(text) for text in ("the cat", "they have one dog with you", "was not")]
    alone = [loglikelihood(server, prompt)[0]["token_logprobs"][1:] for prompt in prompts]
    together = [logprobs["token_logprobs"][1:] for logprobs in loglikelihood(server, *prompts)]
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_a_greedy_continuation_is_called_greedy(server, tokenize):
    context = tokenize("the cat ")
    body = {"prompt": context, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    continuation = server.request("POST", "/v1/completions", body)[1]["choices"][0]["token_ids"]
    logprobs = loglikelihood(server, [*context, *continuation])[0]
    scored = list(zip(logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True))[len(context) : -1]
    assert len(scored) == len(continuation)
    assert all(logprob == max(top.values()) for logprob, top in scored)


def test_scores_are_of_the_raw_distribution_whatever_the_sampling(server, tokenize):
    prompt = tokenize("the cat sat")
    plain = loglikelihood(server, prompt)[0]["token_logprobs"]
    body = {"prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 5, "top_k": 1}
    body |= {"repetition_penalty": 2.0, "logit_bias": {"7": 50}}
    bent = server.request("POST", "/v1/completions", body)[1]["choices"][0]["logprobs"]["token_logprobs"]
    assert bent[1:-1] == pytest.approx(plain[1:-1], abs=1e-4)


def test_a_string_is_scored_as_its_tokens(server, tokenize):
    text = "the cat sat"
    body = {"prompt": text, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    choice = server.request("POST", "/v1/completions", body)[1]["choices"][0]
    assert choice["text"].startswith(text)
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][1:-1] == pytest.approx(
        loglikelihood(server, tokenize(text))[0]["token_logprobs"][1:-1], abs=1e-4
    )
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"][offset:].startswith(token)


def test_generation_stops_before_any_of_many_stops(server):
    body = {"prompt": ["the", "cat"], "max_tokens": 64, "temperature": 0, "seed": 1234}
    body["stop"] = ["<|im_end|>", "\n", "the", "and", "Q:", "</s>"]
    status, answer = server.request("POST", "/v1/completions", body)
    assert status == 200
    for choice in answer["choices"]:
        assert not [stop for stop in body["stop"] if stop in choice["text"]]
