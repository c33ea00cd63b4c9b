from hypothesis import given
from hypothesis import strategies as st

from sardonyx.api.openai.logprobs import (
    CompletionLogprobsWriter,
    chat_logprobs,
    id_name,
    join_logprobs,
    prompt_logprobs,
    text_name,
)
from sardonyx.serving.options import PromptInfo, TokenInfo


def token(token_id: int, data: bytes, logprob: float = -1.0, top: list[tuple[int, bytes, float]] | None = None):
    alternatives = [(other, text.decode("utf-8", "replace"), text, value) for other, text, value in top or []]
    return TokenInfo(token_id, data.decode("utf-8", "replace"), data, logprob, alternatives)


def test_of_two_alternatives_with_one_name_the_likelier_stays():
    tokens = [token(2, b"\xa2", -3.0, [(1, b"\xa1", -0.5), (2, b"\xa2", -3.0)])]
    written = CompletionLogprobsWriter(text_name).write(tokens)
    assert written.top_logprobs == [{"\ufffd": -0.5}]
    assert written.token_logprobs == [-3.0]


def test_the_token_itself_is_among_its_alternatives():
    tokens = [token(2, b"b", -3.0, [(1, b"a", -0.5)])]
    assert CompletionLogprobsWriter(text_name).write(tokens).top_logprobs == [{"a": -0.5, "b": -3.0}]
    assert CompletionLogprobsWriter(id_name).write(tokens).tokens == ["token_id:2"]


def test_silent_tokens_move_no_offset():
    tokens = [token(0, b"<s>"), token(1, b"ab"), token(2, b"c")]
    assert CompletionLogprobsWriter(text_name, {0}).write(tokens).text_offset == [0, 0, 2]


@given(st.text(min_size=1), st.data())
def test_offsets_count_the_characters_before_a_token(text, data):
    """Whatever bytes a token holds, also parts of characters; and in however many pieces they are written."""
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)), max_size=6)))
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    tokens = [token(number, part) for number, part in enumerate(parts)]
    whole = CompletionLogprobsWriter(text_name).write(tokens)
    assert whole.text_offset == [len(raw[:cut].decode("utf-8", "ignore")) for cut in [0, *cuts]]
    half = len(tokens) // 2
    writer = CompletionLogprobsWriter(text_name)
    assert join_logprobs(writer.write(tokens[:half]), writer.write(tokens[half:])) == whole


def test_the_newer_form_has_bytes_of_parts_of_characters():
    content = chat_logprobs([token(1, b"\xc3", -0.5, [(1, b"\xc3", -0.5)])], text_name).content
    assert content[0].bytes == [0xC3]
    assert content[0].top_logprobs[0].logprob == -0.5


def test_prompt_alternatives_are_ranked_and_the_token_is_there_even_below_them():
    scored = token(7, b"x", -9.0, [(1, b"a", -0.5), (2, b"b", -1.0)])
    prompt = PromptInfo([5, 7], "?x", [None, scored])
    first, second = prompt_logprobs(prompt)
    assert first is None
    assert {key: value.rank for key, value in second.items()} == {"7": None, "1": 1, "2": 2}
    assert prompt_logprobs(PromptInfo([5], "?")) is None
