"""Steering tokens and alignment heads, from the words of every kind of publisher."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
from tests.export.whisper_tokenizers import END_ID, write_tokenizer

from sardonyx.repository.families import Whisper
from sardonyx_export.errors import ExportError
from sardonyx_export.families.whisper_tokens import read_whisper_facts
from sardonyx_export.whisper_spec import WhisperSpec

SPEC = WhisperSpec(
    num_mels=80,
    num_frames=3000,
    hidden_size=32,
    num_encoder_layers=4,
    num_encoder_heads=2,
    encoder_ffn_size=64,
    num_decoder_layers=4,
    num_decoder_heads=2,
    decoder_ffn_size=64,
    vocab_size=300,
    max_model_len=448,
)
ENGLISH = msgspec.structs.replace(SPEC, vocab_size=51_864)


def _read(folder: Path, generation: dict[str, Any] | None = None, spec: WhisperSpec = SPEC, **config: Any) -> Whisper:
    texts = {"tokenizer.json": (folder / "tokenizer.json").read_bytes()}
    if generation is not None:
        texts["generation_config.json"] = json.dumps(generation).encode()
    return read_whisper_facts(texts, config, spec)


def test_ids_are_those_of_the_tokenizers_names(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path)
    facts = _read(tmp_path)
    assert (facts.start_id, facts.end_id) == (ids["<|startoftranscript|>"], END_ID)
    assert facts.previous_id == ids["<|startofprev|>"]
    assert facts.no_speech_id == ids["<|nospeech|>"]
    assert facts.no_timestamps_id == ids["<|notimestamps|>"]
    assert facts.timestamp_begin_id == ids["<|0.00|>"]
    assert (facts.transcribe_id, facts.translate_id) == (ids["<|transcribe|>"], ids["<|translate|>"])
    assert facts.language_ids == {name: ids[f"<|{name}|>"] for name in ("en", "de", "haw")}


def test_sizes_are_the_specs(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    facts = _read(tmp_path)
    assert (facts.vocab_size, facts.max_model_len, facts.num_mels, facts.num_frames) == (300, 448, 80, 3000)
    assert (facts.kv.num_layers, facts.kv.num_kv_heads, facts.kv.head_size) == (4, 2, 16)


def test_one_more_language_moves_all_tokens_behind_it(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "v2")
    write_tokenizer(tmp_path / "v3", languages=("en", "de", "haw", "yue"))
    old, new = _read(tmp_path / "v2"), _read(tmp_path / "v3")
    assert new.language_ids["yue"] == old.translate_id
    assert new.timestamp_begin_id == old.timestamp_begin_id + 1
    assert new.no_speech_id == old.no_speech_id + 1


def test_english_only_models_take_no_language_and_no_task(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path, no_speech="<|nocaptions|>", num_timestamps=0)
    for facts in (_read(tmp_path, spec=ENGLISH), _read(tmp_path, {"is_multilingual": False})):
        assert (facts.transcribe_id, facts.translate_id, facts.language_ids) == (None, None, {})
        assert facts.no_speech_id == ids["<|nocaptions|>"]
        assert facts.timestamp_begin_id == ids["<|notimestamps|>"] + 1
        assert {ids["<|en|>"], ids["<|transcribe|>"]} <= {*facts.suppress_ids}


@pytest.mark.parametrize("word", ["suppress_tokens", "suppress_ids"])
def test_steering_tokens_are_never_a_result_whatever_the_list_says(tmp_path: Path, word: str) -> None:
    ids = write_tokenizer(tmp_path)
    facts = _read(tmp_path, {word: [3, ids["<|0.00|>"], END_ID]})
    steering = {value for name, value in ids.items() if END_ID < value < ids["<|0.00|>"]}
    assert facts.suppress_ids == sorted({3} | steering)


def test_lists_of_older_checkpoints_lie_in_their_configuration(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    facts = _read(tmp_path, {}, suppress_tokens=[5], begin_suppress_tokens=[6, END_ID])
    assert facts.suppress_ids[0] == 5
    assert facts.begin_suppress_ids == [6, END_ID]


@pytest.mark.parametrize("generation", [{}, {"suppress_tokens": [-1]}])
def test_without_a_list_signs_and_notes_are_suppressed_and_letters_are_not(
    tmp_path: Path, generation: dict[str, Any]
) -> None:
    write_tokenizer(tmp_path)
    encode = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode
    suppressed = {*_read(tmp_path, generation).suppress_ids}
    for sign in '("#*+/:;<=>@[]^_`{|}~':
        assert encode(sign).ids[0] in suppressed, sign
    assert encode("♪").ids[0] in suppressed
    for sign in "abz09.,?!$%&":
        assert encode(sign).ids[0] not in suppressed, sign


def test_no_result_begins_with_a_space_or_the_end(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    space = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(" ").ids
    assert _read(tmp_path).begin_suppress_ids == sorted([*space, END_ID])
    for word in ("begin_suppress_tokens", "suppress_ids_begin"):
        assert _read(tmp_path, {word: [9]}).begin_suppress_ids == [9]


def test_languages_are_those_that_the_checkpoint_lists(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path)
    for generation in ({"lang_to_id": {"<|de|>": ids["<|de|>"]}}, {"lang_ids": [ids["<|de|>"]]}):
        assert _read(tmp_path, generation).language_ids == {"de": ids["<|de|>"]}


def test_heads_are_the_checkpoints_or_all_of_the_last_half(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert _read(tmp_path, {"alignment_heads": [[3, 1], [0, 0]]}).alignment_heads == [[3, 1], [0, 0]]
    assert _read(tmp_path).alignment_heads == [[2, 0], [2, 1], [3, 0], [3, 1]]
    assert _read(tmp_path, {"alignment_heads": []}).alignment_heads == []


@pytest.mark.parametrize(
    ("generation", "said"),
    [
        ({"alignment_heads": [[4, 0]]}, "alignment_heads.*4 layers of 2"),
        ({"alignment_heads": [[0]]}, "alignment_heads"),
        ({"alignment_heads": 3}, "alignment_heads"),
        ({"suppress_tokens": [300]}, "suppress_tokens"),
        ({"suppress_ids": "all"}, "suppress_ids"),
        ({"lang_ids": [7]}, "lang_to_id: names token 7, which is no language"),
    ],
)
def test_what_does_not_exist_is_refused_by_name(tmp_path: Path, generation: dict[str, Any], said: str) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ExportError, match=said):
        _read(tmp_path, generation)


@pytest.mark.parametrize("name", ["<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>", "<|transcribe|>"])
def test_a_tokenizer_without_a_steering_token_is_refused(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path, left_out=name)
    with pytest.raises(ExportError, match=r"tokenizer\.json: has no token " + name.replace("|", r"\|")):
        _read(tmp_path)


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    ids = write_tokenizer(tmp_path)
    with pytest.raises(ExportError, match="they should ascend"):
        _read(tmp_path, spec=msgspec.structs.replace(SPEC, vocab_size=ids["<|0.00|>"]))
    write_tokenizer(tmp_path, languages=())
    with pytest.raises(ExportError, match="no tokens of languages"):
        _read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match="cannot be loaded"):
        _read(tmp_path)
