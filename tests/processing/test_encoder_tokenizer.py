"""Rows of encoder models, held against what the library's own, stateful truncation gives."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.processing.conftest import KINDS as BUILDERS
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from sardonyx.errors import ConfigError, ContextLengthExceeded, InvalidRequest
from sardonyx.processing.encoder_tokenizer import MAX_CHARS_PER_TOKEN, EncoderTokenizer, Row

KINDS = ["word_piece", "unigram", "byte_level", "word_level"]
TEXTS = st.text(st.sampled_from("the lazy dog. Über été 猫🙂 [SEP]\n"), max_size=80)


def bert(backend: Backend) -> None:
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))


def roberta(backend: Backend) -> None:
    backend.post_processor = processors.RobertaProcessing(("b", 1), ("a", 0), trim_offsets=True)


def xlm_roberta(backend: Backend) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<unk> $A </s>", pair="<unk> $A </s> </s> $B </s>", special_tokens=[("<unk>", 0), ("</s>", 1)]
    )


POST: dict[str, Callable[[Backend], None]] = {
    "word_piece": bert,
    "unigram": xlm_roberta,
    "byte_level": roberta,
    "word_level": lambda _: None,
}


@pytest.fixture(scope="module")
def libraries() -> dict[str, Backend]:
    result = {}
    for kind in KINDS:
        result[kind] = BUILDERS[kind]()
        POST[kind](result[kind])
    return result


@pytest.fixture(scope="module")
def ours(libraries: dict[str, Backend], tmp_path_factory: pytest.TempPathFactory) -> dict[str, EncoderTokenizer]:
    root = tmp_path_factory.mktemp("encoders")
    for kind, library in libraries.items():
        (root / kind).mkdir()
        saved = copy.deepcopy(library)
        saved.enable_truncation(4)  # as many published files do
        saved.enable_padding(length=9)
        saved.save(str(root / kind / "tokenizer.json"))
    return {kind: EncoderTokenizer.load(root / kind) for kind in KINDS}


def shown(row: Row) -> tuple[list[int], list[int]]:
    types = [0] * len(row) if row.token_type_ids is None else row.token_type_ids.tolist()
    return row.token_ids.tolist(), types


def cut_by_library(library: Backend, text: str, pair: str | None, most: int, **options: object) -> Backend:
    stateful = copy.deepcopy(library)
    stateful.enable_truncation(most, **options)
    return stateful.encode(text, pair)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, add=st.booleans())
def test_text_has_the_row_that_the_library_gives(kind, text, add, libraries, ours) -> None:
    expected = libraries[kind].encode(text, add_special_tokens=add)
    if expected.ids or kind != "byte_level":
        row = ours[kind].encode(text, add_special_tokens=add)
        assert shown(row) == ((expected.ids, expected.type_ids) if expected.ids else ([unknown(kind, libraries)], [0]))


def unknown(kind: str, libraries: dict[str, Backend]) -> int:
    return libraries[kind].token_to_id({"word_piece": "[UNK]"}.get(kind, "<unk>"))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS.filter(str.strip), most=st.integers(3, 20), side=st.sampled_from(["left", "right"]))
def test_text_is_cut_as_the_library_cuts_it(kind, text, most, side, libraries, ours) -> None:
    expected = cut_by_library(libraries[kind], text, None, most, direction=side)
    assert shown(ours[kind].encode(text, max_tokens=most, side=side)) == (expected.ids, expected.type_ids)


@pytest.mark.parametrize("kind", KINDS)
@given(query=TEXTS.filter(str.strip), text=TEXTS, most=st.integers(5, 30), side=st.sampled_from(["left", "right"]))
def test_second_of_a_pair_is_cut_as_the_library_cuts_it(kind, query, text, most, side, libraries, ours) -> None:
    library = libraries[kind]
    alone = len(library.encode(query, add_special_tokens=False)) + library.num_special_tokens_to_add(is_pair=True)
    if alone >= most and len(library.encode(query, text)) > most:
        with pytest.raises(ContextLengthExceeded, match="shorten the query"):
            ours[kind].encode_pair(query, text, max_tokens=most, side=side)
        return
    expected = cut_by_library(library, query, text, most, strategy="only_second", direction=side)
    # Without a post-processor the library tells the two apart all the same; then they come from nowhere a model knows.
    types = expected.type_ids if kind != "word_level" else [0] * len(expected.ids)
    assert shown(ours[kind].encode_pair(query, text, max_tokens=most, side=side)) == (expected.ids, types)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS.filter(str.strip), most=st.integers(4, 20), stride=st.integers(0, 9))
def test_windows_are_those_of_the_library(kind, text, most, stride, libraries, ours) -> None:
    room = most - libraries[kind].num_special_tokens_to_add(is_pair=False)
    expected = cut_by_library(libraries[kind], text, None, most, stride=min(stride, room // 2))
    rows = ours[kind].windows(text, most, stride=stride)
    assert [shown(row)[0] for row in rows] == [each.ids for each in (expected, *expected.overflowing)]
    assert all(len(row) <= most for row in rows)


def test_pair_has_the_types_of_the_post_processor(ours) -> None:
    row = ours["word_piece"].encode_pair("the dog", "lazy")
    ids, types = shown(row)
    assert ids[0] == 2
    assert ids.count(3) == 2
    second = ids.index(3) + 1
    assert types == [0] * second + [1] * (len(ids) - second)
    assert ours["word_piece"].encode("the dog").token_type_ids is None


def test_empty_text_is_its_special_tokens_or_the_unknown_token(ours, libraries) -> None:
    assert ours["word_piece"].encode("").token_ids.tolist() == [2, 3]
    assert ours["word_piece"].encode("", add_special_tokens=False).token_ids.tolist() == [1]
    assert ours["unigram"].encode("", add_special_tokens=False).token_ids.tolist() == [0]
    assert ours["word_level"].encode("").token_ids.tolist() == [unknown("word_level", libraries)]
    with pytest.raises(InvalidRequest, match="no tokens"):
        ours["byte_level"].encode("", add_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_surrogate_pair_is_refused(kind, ours) -> None:
    bad = "dog \ud83d"
    for encode in (
        lambda: ours[kind].encode(bad),
        lambda: ours[kind].encode(bad, max_tokens=4),
        lambda: ours[kind].encode_pair(bad, "dog"),
        lambda: ours[kind].encode_pair("dog", bad, max_tokens=9),
        lambda: ours[kind].windows(bad, 8),
    ):
        with pytest.raises(InvalidRequest, match="half a surrogate pair") as caught:
            encode()
        assert caught.value.param == "input"


def test_cutting_to_fewer_tokens_than_the_special_ones_is_refused(ours) -> None:
    with pytest.raises(InvalidRequest, match="at least 3"):
        ours["word_piece"].encode("dog", max_tokens=2)
    assert len(ours["word_piece"].encode("dog", max_tokens=1, add_special_tokens=False)) == 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_huge_text_is_cut_before_it_is_tokenised(ours, side) -> None:
    tokenizer = ours["word_piece"]
    text = "dog " * 2_000_000
    kept = tokenizer.encode(text, max_tokens=12, side=side)
    assert kept.token_ids.tolist() == tokenizer.encode("dog " * 10).token_ids.tolist()
    assert len(tokenizer.encode_pair("the", text, max_tokens=12, side=side)) == 12
    blank = tokenizer.encode(" " * 10 * MAX_CHARS_PER_TOKEN + "dog", max_tokens=12)
    assert blank.token_ids.tolist() == [2, 3]


def test_prompt_is_counted_without_a_trailing_special_token(ours) -> None:
    tokenizer = ours["word_piece"]
    assert tokenizer.count_prompt_tokens("the dog ") == len(tokenizer.encode("the dog ")) - 1
    assert ours["word_level"].count_prompt_tokens("the dog") == 2


def test_threads_that_cut_differently_do_not_disturb_each_other(ours) -> None:
    tokenizer = ours["word_piece"]
    text = "the lazy dog sleeps " * 20
    lengths: dict[int, set[int]] = {most: set() for most in (5, 17, 40)}

    def cut(most: int) -> None:
        for _ in range(100):
            lengths[most].add(len(tokenizer.encode(text, max_tokens=most)))

    threads = [threading.Thread(target=cut, args=(most,)) for most in lengths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == {most: {most} for most in lengths}


def test_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is missing"):
        EncoderTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        EncoderTokenizer.load(tmp_path)
