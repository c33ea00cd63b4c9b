from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny_models import make_language_model

from sardonyx.errors import ContextLengthExceeded, InvalidRequest
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.serving.options import GenerationOptions
from sardonyx.serving.prompts import PromptEncoder, num_text_bytes


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def make(tokenizer: Tokenizer, max_model_len: int = 32) -> PromptEncoder:
    return PromptEncoder(tokenizer, max_model_len=max_model_len, vocab_size=tokenizer.vocab_size)


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters()))
def test_text_is_measured_in_utf8_bytes(text: str) -> None:
    assert num_text_bytes(text) == len(text.encode("utf-8", "surrogatepass"))


def test_text_beyond_8_bytes_a_position_is_refused_unread(tokenizer: Tokenizer) -> None:
    encoder = make(tokenizer)
    assert encoder.measure("x" * 256) == 256
    assert encoder.measure("x" * 100, "é" * 78) == 256
    with pytest.raises(ContextLengthExceeded):
        encoder.measure("x" * 101, "é" * 78)
    for text in ("x" * 257, "é" * 129, "x" * 1_000_000):
        with pytest.raises(ContextLengthExceeded) as caught:
            encoder.measure(text, param="messages")
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


@settings(deadline=None)
@given(prompt_len=st.integers(1, 40), max_tokens=st.none() | st.integers(0, 40), limit=st.none() | st.integers(-1, 40))
def test_prompt_and_completion_always_fit_the_model(
    tokenizer: Tokenizer, prompt_len: int, max_tokens: int | None, limit: int | None
) -> None:
    encoder = make(tokenizer)
    options = GenerationOptions(max_tokens=max_tokens, truncate_prompt_tokens=limit or None)
    ids = list(range(10, 10 + prompt_len))
    try:
        (prompt,) = encoder.encode([ids], options)
    except ContextLengthExceeded:
        assert (
            min(prompt_len, limit if (limit or -1) > 0 else prompt_len) + (1 if max_tokens is None else max_tokens) > 32
        )
        return
    given_tokens = encoder.max_tokens(len(prompt.token_ids), options)
    assert prompt.token_ids == ids[-len(prompt.token_ids) :]
    assert len(prompt.token_ids) + given_tokens <= 32
    assert given_tokens == (32 - len(prompt.token_ids) if max_tokens is None else max_tokens)


def test_a_string_is_echoed_as_it_came_and_ids_as_what_they_spell(tokenizer: Tokenizer) -> None:
    text = "the é <|endoftext|>"
    ids = tokenizer.encode(text)
    one, two = make(tokenizer).encode([text, ids], GenerationOptions())
    assert one == two
    assert one.text == text


def test_string_prompts_get_a_bos_where_the_tokenizer_adds_one_and_ids_never(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(make_language_model(tmp_path, add_bos_token=True))
    encoder, plain = make(tokenizer), tokenizer.encode("the", add_special_tokens=False)
    with_bos, ids = encoder.encode(["the", plain], GenerationOptions())
    assert (with_bos.token_ids, ids.token_ids) == ([tokenizer.bos_token_id, *plain], plain)
    assert with_bos.text == "the"
    (without,) = encoder.encode(["the"], GenerationOptions(add_special_tokens=False))
    assert without.token_ids == plain


def test_an_empty_prompt_without_a_token_to_begin_with_is_refused(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    tokenizer.bos_token_id = None
    (prompt,) = make(tokenizer).encode([""], GenerationOptions())
    assert prompt.token_ids == [tokenizer.eos_token_id]
    tokenizer.eos_token_id = None
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        make(tokenizer).encode([""], GenerationOptions())
