from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sardonyx.core import FinishReason, SequenceEvent, TokenLogprobs
from sardonyx.processing.detokenizer import Detokenizer
from sardonyx.processing.tokenizer import Tokenizer
from sardonyx.serving.completion import Completion, best, merge
from sardonyx.serving.options import Choice, GenerationOptions, TextChunk, TokenInfo

EOS = 0
"""The tiny tokenizer's ``<|endoftext|>``."""


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def make(tokenizer: Tokenizer, prompt_ids: list[int] | None = None, **options: object) -> Completion:
    return Completion(
        0,
        tokenizer,
        GenerationOptions(**options),  # type: ignore[arg-type]
        prompt_ids=prompt_ids or [],
        eos_token_ids=frozenset({EOS}),
    )


def run(completion: Completion, ids: list[int], reason: FinishReason, split: int = 1) -> TextChunk:
    """All chunks as one; the last event carries the finish reason."""
    parts = [ids[start : start + split] for start in range(0, len(ids), split)] or [[]]
    whole = TextChunk(index=0, text="", token_ids=[], tokens=[])
    for number, part in enumerate(parts):
        event = SequenceEvent(
            request_id="r", token_ids=part, finish_reason=reason if number == len(parts) - 1 else None
        )
        merge(whole, completion.push(event))
        if whole.finish_reason is not None:
            break
    return whole


def test_the_models_end_token_adds_no_text_but_counts(tokenizer: Tokenizer) -> None:
    completion = make(tokenizer)
    chunk = run(completion, [*tokenizer.encode("and"), EOS], FinishReason.STOP)
    assert (chunk.text, chunk.finish_reason, chunk.stop_reason) == ("and", FinishReason.STOP, None)
    assert chunk.token_ids[-1] == EOS
    assert completion.num_tokens == len(chunk.token_ids)


def test_an_end_token_of_the_callers_is_named(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("and you")
    chunk = run(make(tokenizer, stop_token_ids=(ids[-1],)), ids, FinishReason.STOP)
    assert (chunk.text, chunk.stop_reason) == ("and ", ids[-1])


def test_a_stop_token_is_shown_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("and you")
    chunk = run(make(tokenizer, stop_token_ids=(ids[-1],), include_stop_str_in_output=True), ids, FinishReason.STOP)
    assert chunk.text == "and you"


def test_special_tokens_in_the_middle_are_shown_when_asked_for(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("and"), EOS, *tokenizer.encode("you")]
    assert run(make(tokenizer, ignore_eos=True), ids, FinishReason.LENGTH).text == "andyou"
    shown = run(make(tokenizer, ignore_eos=True, skip_special_tokens=False), ids, FinishReason.LENGTH)
    assert shown.text == "and<|endoftext|>you"


def test_a_stop_string_across_tokens_cuts_the_text_and_counts_up_to_the_match(tokenizer: Tokenizer) -> None:
    completion = make(tokenizer, stop=("bc",))
    ids = tokenizer.encode("xabcyz")
    chunk = run(completion, ids, FinishReason.LENGTH, split=len(ids))
    assert (chunk.text, chunk.finish_reason, chunk.stop_reason) == ("xa", FinishReason.STOP, "bc")
    assert tokenizer.decode(chunk.token_ids) == "xabc"
    assert completion.num_tokens == len(chunk.token_ids) == 4


def test_text_that_could_become_a_stop_string_comes_at_the_end(tokenizer: Tokenizer) -> None:
    completion = make(tokenizer, stop=("bcx",))
    ids = tokenizer.encode("abc")
    chunks = [completion.push(SequenceEvent(request_id="r", token_ids=[token_id])) for token_id in ids]
    assert [chunk.text for chunk in chunks] == ["a", "", ""]
    end = completion.push(SequenceEvent(request_id="r", finish_reason=FinishReason.LENGTH))
    assert (end.text, end.finish_reason) == ("bc", FinishReason.LENGTH)


def test_an_aborted_choice_gives_the_text_it_held_back(tokenizer: Tokenizer) -> None:
    completion = make(tokenizer, stop=("abc",))
    completion.push(SequenceEvent(request_id="r", token_ids=tokenizer.encode("ab")))
    chunk = completion.cut()
    assert (chunk.text, chunk.finish_reason) == ("ab", FinishReason.CANCELLED)


def test_half_a_character_at_the_end_completes_a_stop_string_of_replacement_characters(tokenizer: Tokenizer) -> None:
    half = tokenizer.encode("é")[:1]
    assert tokenizer.token_text(half[0]) == "\ufffd"
    chunk = run(make(tokenizer, stop=("\ufffd",)), half, FinishReason.LENGTH)
    assert (chunk.text, chunk.finish_reason) == ("", FinishReason.STOP)


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ababab")
    assert run(make(tokenizer, stop=("ab",)), ids, FinishReason.LENGTH).text == ""
    assert run(make(tokenizer, stop=("ab",), min_tokens=3), ids, FinishReason.LENGTH).text == "abab"


def test_log_probabilities_carry_text_and_bytes(tokenizer: Tokenizer) -> None:
    token_id = tokenizer.encode("the")[0]
    logprobs = TokenLogprobs(token_id, -0.5, [(EOS, -0.25), (token_id, -0.5)])
    chunk = make(tokenizer).push(SequenceEvent(request_id="r", token_ids=[token_id], logprobs=[logprobs]))
    top = [(EOS, "<|endoftext|>", b"<|endoftext|>", -0.25), (token_id, "the", b"the", -0.5)]
    assert chunk.tokens == [TokenInfo(token_id=token_id, text="the", bytes_=b"the", logprob=-0.5, top=top)]


def test_a_character_that_the_prompt_began_is_completed(tokenizer: Tokenizer) -> None:
    first, second = tokenizer.encode("é")
    assert run(make(tokenizer, prompt_ids=[first]), [second], FinishReason.LENGTH).text == "é"


@settings(deadline=None)
@given(data=st.data(), stops=st.lists(st.text("ab\n e", min_size=1, max_size=4), max_size=3))
def test_text_and_count_are_those_of_the_first_complete_stop_string(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str]
) -> None:
    alphabet = [token_id for char in "ab\n e" for token_id in tokenizer.encode(char)]
    ids = data.draw(st.lists(st.sampled_from([*alphabet, *tokenizer.encode("thee")]), max_size=20))
    completion = make(tokenizer, stop=tuple(stops))
    chunk = run(completion, ids, FinishReason.LENGTH, split=data.draw(st.integers(1, 5)))
    text, num_tokens, stopped = "", 0, False
    detokenizer = Detokenizer(tokenizer)
    for token_id in ids:
        num_tokens += 1
        for char in detokenizer.push(token_id):
            text += char
            ends = [stop for stop in stops if text.endswith(stop)]
            if ends:
                text, stopped = text.removesuffix(max(ends, key=len)), True
                break
        if stopped:
            break
    assert chunk.text == text
    assert completion.num_tokens == num_tokens == len(chunk.token_ids)
    assert chunk.finish_reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)


@settings(deadline=None)
@given(data=st.data(), stops=st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_text_does_not_depend_on_how_tokens_come(tokenizer: Tokenizer, data: st.DataObject, stops: list[str]) -> None:
    ids = data.draw(st.lists(st.integers(5, tokenizer.vocab_size - 1), max_size=20))
    options = {"stop": tuple(stops), "min_tokens": data.draw(st.integers(0, 5))}
    one = run(make(tokenizer, **options), ids, FinishReason.LENGTH)
    many = run(make(tokenizer, **options), ids, FinishReason.LENGTH, split=data.draw(st.integers(1, 20)))
    assert one == many


def test_the_best_choices_have_the_highest_mean_and_keep_order_in_ties() -> None:
    def choice(index: int, *logprobs: float) -> Choice:
        tokens = [TokenInfo(token_id=1, text="", bytes_=b"", logprob=each, top=[]) for each in logprobs]
        return Choice(index=index, text="", token_ids=[], tokens=tokens, finish_reason=FinishReason.STOP)

    choices = [choice(0, -3.0), choice(1, -1.0, -1.0), choice(2, -1.0), choice(3, -2.0, -0.5)]
    assert [each.index for each in best(choices, 3)] == [1, 2, 3]
