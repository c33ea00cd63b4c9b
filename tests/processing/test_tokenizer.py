import json
import shutil
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from sardonyx.errors import ConfigError, InvalidRequest
from sardonyx.processing.tokenizer import Tokenizer

KINDS = ["byte_level", "sentence_piece", "gemma_like", "unigram", "word_piece", "word_level"]


def copy(folder: Path, target: Path, **files: object) -> Path:
    """A version folder with some files replaced; the keys are file names with ``__`` for the dot."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    for name, content in files.items():
        path = target / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return target


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60))
def test_a_text_has_the_ids_that_the_library_gives(
    kind: str, text: str, tokenizers: dict[str, Tokenizer], backends: dict[str, Backend]
) -> None:
    for add in (True, False):
        expected = backends[kind].encode(text, add_special_tokens=add).ids
        assert tokenizers[kind].encode(text, add_special_tokens=add) == expected


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_ids_have_the_text_that_the_library_gives(
    kind: str, data: st.DataObject, tokenizers: dict[str, Tokenizer], backends: dict[str, Backend]
) -> None:
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    if kind in {"sentence_piece", "gemma_like"}:  # in these, invalid bytes are counted in another way: see below
        ids = [token_id for token_id in ids if not (tokenizer.token_string(token_id) or "").startswith("<0x")]
    for skip in (True, False):
        expected = backends[kind].decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "gemma_like"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_survives_encoding_and_decoding(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode_plain(text)
    assert tokenizer.decode(ids) == (text.replace("▁", " ") if kind != "byte_level" else text)


@given(data=st.data())
def test_token_bytes_joined_are_the_text_of_a_byte_level_tokenizer(
    data: st.DataObject, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers["byte_level"]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8", "replace")
    assert text == tokenizer.decode(ids, skip_special_tokens=False)


def test_token_bytes_are_right_for_every_way_to_spell_them(tokenizers: dict[str, Tokenizer]) -> None:
    def bytes_of(kind: str, token: str) -> bytes:
        token_id = tokenizers[kind].token_id(token)
        assert token_id is not None
        return tokenizers[kind].token_bytes(token_id)

    assert bytes_of("byte_level", "Ġthe") == b" the"
    assert bytes_of("byte_level", "Ċ") == b"\n"
    assert bytes_of("byte_level", "ð") == b"\xf0"
    assert bytes_of("byte_level", "<|im_end|>") == b"<|im_end|>"
    assert bytes_of("byte_level", "   ") == b"   "
    assert bytes_of("byte_level", "<｜fim▁hole｜>") == "<｜fim▁hole｜>".encode()
    assert bytes_of("sentence_piece", "<0x0A>") == b"\n"
    assert bytes_of("sentence_piece", "<0xF0>") == b"\xf0"
    assert bytes_of("sentence_piece", "▁The") == b" The"
    assert bytes_of("unigram", "▁over") == b" over"
    assert bytes_of("word_piece", "##e") == b"e"
    assert bytes_of("word_level", "dog,") == b" dog,"


def test_half_a_character_is_shown_as_replacement(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentence_piece"]
    first, rest = tokenizer.token_id("<0xF0>"), tokenizer.token_id("<0x9F>")
    assert first is not None
    assert rest is not None
    assert tokenizer.token_text(first) == "\ufffd"
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.token_string(tokenizer.vocab_size) is None
    assert tokenizer.decode([-1, tokenizer.vocab_size + 7]) == ""


def test_one_invalid_byte_spoils_only_itself(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["gemma_like"]
    ids = [3 + byte for byte in "猫".encode() + b"\xff" + b"a"]
    assert tokenizer.decode(ids) == "猫\ufffda"


def test_special_tokens_come_from_both_configurations(folders: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folders["byte_level"])
    end = tokenizer.token_id("<|im_end|>")
    assert tokenizer.special_tokens == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids) == (end, (end,))
    other = tokenizer.token_id("<|end|>")
    folder = copy(folders["byte_level"], tmp_path, generation_config__json={"eos_token_id": [other, end]})
    assert Tokenizer.load(folder).eos_token_ids == (end, other)


def test_generation_config_names_tokens_that_the_tokenizer_config_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(folders["gemma_like"], tmp_path, generation_config__json={"bos_token_id": 1, "eos_token_id": 2})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.pad_token_id is None


def test_info_is_plain_strings(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(folders["byte_level"], tmp_path, chat_template__jinja="{{ messages }}")
    assert Tokenizer.load(folder).info() == {
        "tokenizer_class": "Fast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": None,
        "pad_token": "<|endoftext|>",
        "chat_template": "{{ messages }}",
    }


def test_template_file_comes_before_the_configuration(folders: dict[str, Path], tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = copy(folders["gemma_like"], tmp_path, tokenizer_config__json={"chat_template": named})
    assert Tokenizer.load(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(folder).chat_template == "F"


def test_truncation_and_padding_saved_with_the_tokenizer_are_ignored(tmp_path: Path, folders: dict[str, Path]) -> None:
    backend = Backend.from_file(str(folders["byte_level"] / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode("The quick brown fox jumps over")) == "The quick brown fox jumps over"
    assert 0 < len(tokenizer.encode("The")) < 4


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is missing") as error:
        Tokenizer.load(tmp_path)
    assert error.value.file == str(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("file", "content", "field"),
    [
        ("tokenizer__json", "{", None),
        ("tokenizer__json", {"model": {}}, None),
        ("tokenizer_config__json", {"eos_token": 5}, "eos_token"),
        ("tokenizer_config__json", {"eos_token": "<nowhere>"}, "eos_token"),
        ("tokenizer_config__json", '["list"]', None),
        ("generation_config__json", {"eos_token_id": "2"}, "eos_token_id"),
        ("generation_config__json", '{"eos_token_id": ', None),
    ],
)
def test_wrong_file_and_field_are_named(
    file: str, content: object, field: str | None, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = copy(folders["byte_level"], tmp_path, **{file: content})
    with pytest.raises(ConfigError) as error:
        Tokenizer.load(folder)
    assert error.value.file == str(folder / file.replace("__", "."))
    assert error.value.field == field


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    ],
)
def test_decoder_that_cannot_stream_is_refused(decoder: object, folders: dict[str, Path], tmp_path: Path) -> None:
    content = json.loads((folders["byte_level"] / "tokenizer.json").read_bytes()) | {"decoder": decoder}
    folder = copy(folders["byte_level"], tmp_path, tokenizer__json=content)
    with pytest.raises(ConfigError) as error:
        Tokenizer.load(folder)
    assert (error.value.field or "").startswith("decoder")


def test_half_a_surrogate_pair_is_the_callers_mistake(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        tokenizers["byte_level"].encode("a\ud800b")


def test_special_tokens_are_found_as_encoding_reads_them(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("byte_level", "sentence_piece", "unigram"):
        tokenizer = tokenizers[kind]
        text = "é<|im_end|> <|im_<|im_start|>end|>"
        spans = tokenizer.find_special(text)
        assert [text[start:end] for start, end in spans] == ["<|im_end|>", "<|im_start|>"]
        assert tokenizer.find_special("<|im_ end|> and <think>") == []


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece", "gemma_like"])
@given(texts=st.lists(st.sampled_from(["<|im_end|>", "<s>", "a", " ", "<|", "im_end", "|>", "é", "\n"]), max_size=8))
def test_plain_encoding_never_gives_a_special_token(
    kind: str, texts: list[str], tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode_plain("".join(texts)))


def test_batch_is_each_text_alone(tokenizers: dict[str, Tokenizer]) -> None:
    texts = ["The fox", "", "猫"]
    assert tokenizers["sentence_piece"].encode_batch(texts) == [tokenizers["sentence_piece"].encode(t) for t in texts]


def test_other_threads_run_while_a_long_text_is_encoded(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["byte_level"]
    text = "The quick brown fox. " * 20_000
    done = threading.Event()
    worker = threading.Thread(target=lambda: (tokenizer.encode(text), done.set()))
    worker.start()
    num_turns = 0
    while not done.wait(0.001):
        num_turns += 1
    worker.join()
    assert num_turns > 3
