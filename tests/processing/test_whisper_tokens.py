import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.processing.whisper_making import LANGUAGES, make_tokens

from sardonyx.errors import InvalidRequest, UnsupportedFeature
from sardonyx.processing.whisper_tokens import TokenWord, WhisperTokens
from sardonyx.repository.families import Whisper

Made = tuple[WhisperTokens, Whisper]


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_tokens(tmp_path_factory.mktemp("whisper") / "multilingual", is_multilingual=True)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_tokens(tmp_path_factory.mktemp("whisper") / "english", is_multilingual=False)


def byte_ids(tokens: WhisperTokens, data: bytes) -> list[int]:
    """One token for each byte."""
    backend = tokens._tokenizer
    by_byte = {backend.token_bytes(i): i for i in range(backend.vocab_size) if len(backend.token_bytes(i)) == 1}
    return [by_byte[bytes([byte])] for byte in data]


def test_multilingual_models_are_told_language_and_task(multilingual: Made) -> None:
    tokens, facts = multilingual
    assert tokens.languages == LANGUAGES
    german = [facts.start_id, facts.language_ids["de"]]
    assert tokens.start_sequence("de", "translate", has_timestamps=True) == [*german, facts.translate_id]
    expected = [*german, facts.transcribe_id, facts.no_timestamps_id]
    assert tokens.start_sequence("de", "transcribe", has_timestamps=False) == expected


@pytest.mark.parametrize("language", [None, "en"])
def test_english_only_models_are_told_neither(language: str | None, english: Made) -> None:
    tokens, facts = english
    assert tokens.languages == ["en"]
    assert tokens.start_sequence(language, "transcribe", has_timestamps=True) == [facts.start_id]
    expected = [facts.start_id, facts.no_timestamps_id]
    assert tokens.start_sequence(language, "transcribe", has_timestamps=False) == expected


def test_unknown_language_is_named(multilingual: Made, english: Made) -> None:
    for (tokens, _), language in ((multilingual, "xx"), (multilingual, None), (english, "de")):
        with pytest.raises(InvalidRequest, match="none of this model's: ") as error:
            tokens.start_sequence(language, "transcribe", has_timestamps=True)
        assert error.value.param == "language"


def test_english_only_models_do_not_translate(english: Made) -> None:
    with pytest.raises(UnsupportedFeature, match="cannot translate"):
        english[0].start_sequence(None, "translate", has_timestamps=True)


def test_special_tokens_in_a_prompt_are_characters(multilingual: Made) -> None:
    tokens, _ = multilingual
    ids = tokens.prompt("\n <|endofall|> The fox. <|en|>  ")
    assert all(map(tokens.is_text, ids))
    assert tokens.text(ids) == " <|endofall|> The fox. <|en|>"


@pytest.mark.parametrize("text", ["", " \n "])
def test_blank_prompt_has_no_tokens(text: str, english: Made) -> None:
    assert english[0].prompt(text) == []


def test_text_leaves_out_what_is_none(english: Made) -> None:
    tokens, facts = english
    fox = tokens.prompt("The fox")
    begin = facts.timestamp_begin_id
    assert tokens.text([facts.start_id, begin, *fox, begin + 99, facts.end_id, begin + 5000]) == " The fox"


def test_half_a_character_is_a_replacement_character(english: Made) -> None:
    tokens, _ = english
    ids = byte_ids(tokens, "猫a🙂".encode())
    assert tokens.text(ids[1:-1]) == "\ufffd\ufffda\ufffd"


def test_timestamps_are_20_ms_apart_and_need_no_names(english: Made) -> None:
    tokens, facts = english
    begin = facts.timestamp_begin_id
    assert [tokens.timestamp_s(begin + i) for i in (0, 1, 1500)] == [0.0, 0.02, 30.0]
    assert [tokens.is_timestamp(i) for i in (facts.end_id, begin - 1, begin, begin + 1500)] == [
        False,
        False,
        True,
        True,
    ]


def test_words_begin_with_spaces_and_punctuation_stands_alone(english: Made) -> None:
    tokens, _ = english
    words = tokens.words(tokens.prompt("The fox's \"lazy\" dog-house, isn't it?"), None)
    assert [word.text for word in words][:2] == [" The", " fox"]
    assert [word.text for word in words][-2:] == [" it", "?"]
    assert "," in [word.text for word in words]


def test_languages_without_spaces_are_cut_at_characters(multilingual: Made) -> None:
    tokens, _ = multilingual
    ids = byte_ids(tokens, "猫 a🙂".encode())
    expected = [TokenWord("猫", ids[:3]), TokenWord(" ", ids[3:4]), TokenWord("a", ids[4:5]), TokenWord("🙂", ids[5:])]
    assert tokens.words(ids, "ja") == expected
    # A lone space is a word by itself where words have spaces; what follows belongs to it.
    assert [word.text for word in tokens.words(ids, "en")] == ["猫", " a🙂"]


def test_token_that_is_no_text_is_a_word(multilingual: Made) -> None:
    tokens, facts = multilingual
    fox = tokens.prompt("fox")
    words = tokens.words([*fox, facts.end_id, facts.end_id], "de")
    assert words == [TokenWord(" fox", fox), *[TokenWord("<|endofall|>", [facts.end_id])] * 2]


@pytest.mark.parametrize("language", ["en", "ja"])
@given(data=st.data())
def test_words_joined_are_the_text_whatever_the_bytes(language: str, data: st.DataObject, multilingual: Made) -> None:
    tokens, facts = multilingual
    broken = st.binary(max_size=4) | st.text(max_size=2).map(lambda text: text.encode("utf-8", "ignore"))
    ids = byte_ids(tokens, b"".join(data.draw(st.lists(broken, max_size=6))))
    ids += data.draw(st.lists(st.integers(0, facts.end_id - 1), max_size=6))
    words = tokens.words(ids, language)
    assert [token_id for word in words for token_id in word.ids] == ids
    assert "".join(word.text for word in words) == tokens.text(ids)
