"""What the `openai` package makes of our answers."""

import asyncio

import httpx
import openai
import pytest

MESSAGES = [{"role": "user", "content": "the cat"}]


def test_models_are_listed_and_described(client):
    assert [model.id for model in client.models.list()] == ["tiny", "gpt-3.5-turbo", "org/tiny"]
    assert client.models.retrieve("tiny").object == "model"
    assert client.models.retrieve("org/tiny").id == "org/tiny"


def test_a_chat_is_answered(client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=8, seed=1)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.completion_tokens <= 8
    assert answer._request_id


def test_a_streamed_chat_adds_up_to_the_whole_one(client):
    options = {"model": "tiny", "messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_the_streaming_helper_sees_every_event(client):
    with client.chat.completions.stream(model="tiny", messages=MESSAGES, max_tokens=6, logprobs=True) as stream:
        kinds = [event.type for event in stream]
        final = stream.current_completion_snapshot
    assert "content.delta" in kinds
    assert "logprobs.content.delta" in kinds
    assert final.choices[0].message.content
    assert len(final.choices[0].logprobs.content) == 6


def test_chat_log_probabilities_are_typed(client):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3, temperature=0
    )
    for token in answer.choices[0].logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.logprob <= 0


def test_a_completion_takes_every_option(client):
    answer = client.completions.create(
        model="gpt-3.5-turbo",
        prompt=["the cat", "the dog"],
        n=2,
        max_tokens=5,
        echo=True,
        logprobs=2,
        temperature=0.7,
        top_p=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"7": -100},
        stop=["\n\n"],
        seed=7,
        user="me",
        extra_body={"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 1},
    )
    assert answer.model == "tiny"
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("the cat")
    assert answer.choices[2].text.startswith("the dog")
    for choice in answer.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
        assert choice.logprobs.token_logprobs[0] is None


def test_a_seed_repeats_a_text(client):
    options = {"model": "tiny", "prompt": "the cat", "max_tokens": 20, "temperature": 1.0}
    texts = {client.completions.create(**options, seed=11).choices[0].text for _ in range(3)}
    assert len(texts) == 1
    others = {client.completions.create(**options, seed=seed).choices[0].text for seed in range(5)}
    assert len(others) > 1


def test_many_clients_get_what_each_would_get_alone(server):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def answer(number: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt=f"the {number}", max_tokens=24, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            alone = [await answer(number) for number in range(12)]
            together = await asyncio.gather(*(answer(number) for number in range(12)))
            assert together == alone

    asyncio.run(main())
    server.wait_for(server.is_idle)


@pytest.mark.parametrize(
    ("kind", "options", "code", "param"),
    [
        (openai.NotFoundError, {"model": "gpt-5"}, "model_not_found", "model"),
        (openai.BadRequestError, {"temperature": -1}, None, "temperature"),
        (openai.BadRequestError, {"prompt": [5] * 3000}, "context_length_exceeded", "prompt"),
        (openai.BadRequestError, {"suffix": "end"}, "unsupported_parameter", "suffix"),
    ],
)
def test_errors_have_their_classes(client, kind, options, code, param):
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x"} | options)
    assert caught.value.code == code
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_a_slash_at_the_end_and_other_methods_do_not_confuse(server):
    assert server.request("GET", "/v1/models/")[0] == 200
    answer = httpx.options(f"{server.url}/v1/completions")
    assert answer.status_code == 204
    assert "POST" in answer.headers["allow"]


def test_a_client_that_stops_listening_can_go_on(client, server):
    for _ in range(5):
        stream = client.completions.create(model="tiny", prompt="x", max_tokens=2000, stream=True)
        next(iter(stream))
        stream.close()
    server.wait_for(server.is_idle)


def test_a_client_that_times_out_leaves_nothing(server):
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=0.05) as client,
        pytest.raises(openai.APITimeoutError),
    ):
        client.completions.create(model="tiny", prompt="x", max_tokens=2000, n=8, extra_body={"ignore_eos": True})
    server.wait_for(server.is_idle)
