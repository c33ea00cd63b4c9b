import pytest
from hypothesis import given
from hypothesis import strategies as st

from sardonyx.processing.detokenizer import Detokenizer
from sardonyx.processing.tokenizer import Tokenizer

KINDS = ["byte_level", "sentence_piece", "gemma_like", "unigram", "word_piece", "word_level"]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_pieces_joined_are_the_decoded_whole(
    kind: str, data: st.DataObject, skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join([*pieces, detokenizer.flush()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "gemma_like"])
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"), max_size=30))
def test_no_half_character_is_ever_emitted(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    detokenizer = Detokenizer(tokenizer)
    seen = ""
    for token_id in tokenizer.encode_plain(text):
        seen += detokenizer.push(token_id)
        assert text.startswith(seen)
    assert detokenizer.flush() == ""
    assert seen == text


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), skip=st.booleans())
def test_text_goes_on_where_the_prompt_ended(
    kind: str, data: st.DataObject, skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    some_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)
    prompt, ids = data.draw(some_ids), data.draw(some_ids)
    before = Detokenizer(tokenizer, skip_special_tokens=skip)
    num_before = len("".join([before.push(token_id) for token_id in prompt]))
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_tail=prompt)
    text = "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()])
    assert text == tokenizer.decode(prompt + ids, skip_special_tokens=skip)[num_before:]


@given(data=st.data())
def test_four_tokens_of_the_prompt_are_enough(data: st.DataObject, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentence_piece"]
    some_ids = st.lists(st.integers(3, tokenizer.vocab_size - 1), min_size=1, max_size=12)
    prompt, ids = data.draw(some_ids), data.draw(some_ids)
    texts = []
    for tail in (prompt, prompt[-4:]):
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, prompt_tail=tail)
        texts.append("".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()]))
    assert texts[0] == texts[1]


def test_leading_space_stays_after_a_prompt_and_goes_without_one(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentence_piece"]
    the = tokenizer.token_id("▁The")
    assert the is not None
    assert Detokenizer(tokenizer).push(the) == "The"
    assert Detokenizer(tokenizer, prompt_tail=[the]).push(the) == " The"


def test_broken_character_becomes_a_replacement_when_it_is_known_to_be_broken(
    tokenizers: dict[str, Tokenizer],
) -> None:
    tokenizer = tokenizers["gemma_like"]
    byte = {value: 3 + value for value in range(256)}
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(byte[0xE7]) == ""
    assert detokenizer.push(byte[0x8C]) == ""
    assert detokenizer.push(byte[0x41]) == "\ufffdA"
    assert detokenizer.push(byte[0xF0]) == ""
    assert detokenizer.flush() == "\ufffd"
