"""What bodies mean, read off the request that the engine gets."""

import pytest

from sardonyx.api.openai.infill import infill_prompt
from sardonyx.errors import InvalidRequest


@pytest.fixture
def request_for(endless):
    """The engine's request for a body."""

    def send(path="/v1/completions", **body):
        body = {"prompt": "hello", "max_tokens": 3} | body
        answer = endless.post(path, body)
        assert answer.status_code == 200, answer.text
        return list(endless.served.runner.requests.values())[-1].request

    return send


def test_defaults_are_openais(request_for):
    sampling = request_for().sampling
    assert sampling.temperature == 1.0
    assert sampling.top_p == 1.0
    assert sampling.top_k == 0
    assert sampling.repetition_penalty == 1.0
    assert sampling.num_logprobs is None
    assert request_for(max_tokens=None).max_tokens == 16


@pytest.mark.parametrize(
    ("body", "field", "value"),
    [
        ({"temperature": 0.5}, "temperature", 0.5),
        ({"temperature": 0.5, "do_sample": False}, "temperature", 0.0),
        ({"temperature": 0.5, "do_sample": True}, "temperature", 0.5),
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 5}, "top_k", 5),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"typical_p": 0.5}, "typical_p", 0.5),
        ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
        ({"presence_penalty": 2}, "presence_penalty", 2.0),
        ({"repetition_penalty": 1.2}, "repetition_penalty", 1.2),
        ({"logit_bias": {"7": -100}}, "logit_bias", {7: -100.0}),
        ({"custom_token_bans": "7, 8"}, "logit_bias", {7: -1e9, 8: -1e9}),
        ({"ban_eos_token": True}, "logit_bias", {0: -1e9, 2: -1e9}),
        ({"seed": 42}, "seed", 42),
        ({"seed": -2}, "seed", 2**63 - 2),
        ({"logprobs": 3}, "num_logprobs", 3),
    ],
)
def test_a_sampling_field_reaches_the_sampler(request_for, body, field, value):
    assert getattr(request_for(**body).sampling, field) == value


def test_a_share_of_nothing_keeps_one_token(request_for):
    assert 0 < request_for(top_p=0).sampling.top_p < 1e-6
    assert 0 < request_for(typical_p=0).sampling.typical_p < 1e-6


def test_the_seed_minus_one_draws_one(request_for):
    assert request_for(seed=-1).sampling.seed is None


@pytest.mark.parametrize(
    ("body", "max_tokens"),
    [
        ({"max_tokens": 5}, 5),
        ({"max_tokens": None, "max_new_tokens": 6}, 6),
        ({"max_tokens": 5, "max_new_tokens": 6}, 5),
        ({"max_tokens": -1}, 251),
        ({"max_tokens": 5, "auto_max_new_tokens": True}, 251),
    ],
)
def test_the_limit_has_several_names(request_for, body, max_tokens):
    assert request_for(**body).max_tokens == max_tokens


def test_stopping_fields_reach_the_engine(request_for):
    request = request_for(min_tokens=2, stop_token_ids=[9])
    assert request.min_tokens == 2
    assert 9 in request.stop_token_ids
    assert 2 in request.stop_token_ids
    assert 2 not in request_for(ignore_eos=True).stop_token_ids


def test_prompts_are_cut_on_the_left(request_for):
    assert len(request_for(truncate_prompt_tokens=2).prompt_ids) == 2
    assert len(request_for(truncation_length=7).prompt_ids) == 4  # beside 3 completion tokens
    assert len(request_for(prompt=[5] * 500, truncate_prompt_tokens=-1).prompt_ids) == 253
    assert len(request_for(prompt=[5] * 500, truncation_length=100_000).prompt_ids) == 253


class FillingTokenizer:
    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def token_id(self, token: str) -> int | None:
        return self.tokens.index(token) if token in self.tokens else None


def test_a_gap_is_filled_with_the_models_own_tokens():
    tokenizer = FillingTokenizer("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
    assert infill_prompt("a", "b", tokenizer) == "<fim_prefix>a<fim_suffix>b<fim_middle>"
    with pytest.raises(InvalidRequest, match="one text"):
        infill_prompt(["a"], "b", tokenizer)
