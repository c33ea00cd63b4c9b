import json
import re
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.repository.conftest import fill_version

from sardonyx.errors import ConfigError
from sardonyx.repository.manifest import MAX_BYTES, Manifest, encode, parse

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def good(tmp_path: Path) -> dict:
    fill_version(tmp_path)
    return json.loads((tmp_path / "manifest.json").read_text())


def parsed(value: object) -> Manifest:
    return parse(json.dumps(value).encode(), file="m.json")


def test_manifest_survives_writing_and_reading(tmp_path):
    manifest = fill_version(tmp_path)
    assert parse(encode(manifest)) == manifest
    assert encode(parse(encode(manifest))) == encode(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2, "new_field": 1}, "m.json: format_version: is 2; this server reads 1"),
        ({"new_field": 1}, "m.json: Object contains unknown field `new_field`"),
        ({"precision": 4}, "m.json: precision: Expected `str`, got `int`"),
        ({"family": "gan"}, "m.json: family: Invalid enum value 'gan'"),
        ({"llm": None}, "m.json: llm: is missing although family is llm"),
        ({"graphs": {}}, "m.json: graphs: needs a decoder"),
    ],
)
def test_wrong_field_is_refused_by_name(good, change, message):
    with pytest.raises(ConfigError) as caught:
        parsed(good | change)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "C:x", ".hidden", "a\0b", "a\nb", "\u202ex", "x" * 256],
)
def test_path_that_is_no_plain_file_name_is_refused(good, path):
    good["files"][0]["path"] = path
    with pytest.raises(ConfigError, match="is not a plain file name"):
        parsed(good)


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64])
def test_sha256_that_is_none_is_refused(good, digest):
    good["files"][0]["sha256"] = digest
    with pytest.raises(ConfigError, match="is not 64 hexadecimal digits"):
        parsed(good)


@pytest.mark.parametrize("field", ["vocab_size", "max_model_len"])
@pytest.mark.parametrize("value", [0, -1, 2**40, 1.5, "8", None])
def test_counts_are_positive_and_bounded(good, field, value):
    good["llm"][field] = value
    with pytest.raises(ConfigError, match=rf"llm\.{field}"):
        parsed(good)


def test_file_that_is_listed_twice_must_agree_with_itself(good):
    good["files"].append(good["files"][0])
    parsed(good)
    good["files"].append(good["files"][0] | {"size_bytes": 0})
    with pytest.raises(ConfigError, match="is listed twice and differs"):
        parsed(good)


def test_large_or_deep_manifest_is_refused():
    for data in (b" " * (MAX_BYTES + 1), b'{"graphs":' * 100_000, b"[" * 100_000, b""):
        with pytest.raises(ConfigError):
            parse(data)


@given(st.binary(max_size=100))
def test_any_bytes_raise_config_error(data):
    with pytest.raises(ConfigError):
        parse(data)


@given(JSON)
def test_any_json_raises_config_error(value):
    with pytest.raises(ConfigError):
        parse(msgspec.json.encode(value))


@given(st.data())
def test_any_value_in_any_place_parses_or_raises_config_error(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("version")
    fill_version(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    target = manifest
    while True:
        key = data.draw(
            st.sampled_from(sorted(target)) if isinstance(target, dict) else st.integers(0, len(target) - 1)
        )
        if not target[key] or not isinstance(target[key], dict | list) or data.draw(st.booleans()):
            break
        target = target[key]
    target[key] = data.draw(JSON)
    with suppress(ConfigError):
        assert isinstance(parse(msgspec.json.encode(manifest)), Manifest)


def test_every_field_has_its_row_in_the_readme():
    text = (Path(__file__).parents[2] / "model_repository/README.md").read_text()
    names = [field.name for field in msgspec.structs.fields(Manifest)]
    assert re.findall(r"^\| `(\w+)` \|", text.partition("## manifest.json")[2], re.MULTILINE) == names


@pytest.fixture
def speech(good: dict) -> dict:
    """The manifest of a Whisper model."""
    graph = good["graphs"]["decoder"]
    whisper = {
        "vocab_size": 64,
        "max_model_len": 32,
        "num_mels": 8,
        "num_frames": 40,
        "kv": {"num_layers": 2, "num_kv_heads": 3, "head_size": 8},
        "start_id": 41,
        "end_id": 40,
        "previous_id": 42,
        "no_speech_id": 43,
        "no_timestamps_id": 44,
        "timestamp_begin_id": 50,
        "transcribe_id": 45,
        "language_ids": {"en": 46, "de": 47},
        "suppress_ids": [1, 63],
        "alignment_heads": [[1, 2], [0, 0]],
    }
    roles = ("encoder", "decoder", "aligner")
    return good | {"family": "whisper", "llm": None, "whisper": whisper, "graphs": dict.fromkeys(roles, graph)}


def test_whisper_model_is_read(speech):
    manifest = parsed(speech)
    assert manifest.whisper is not None
    assert manifest.whisper.language_ids == {"en": 46, "de": 47}
    assert parse(encode(manifest)) == manifest


@pytest.mark.parametrize("role", ["encoder", "decoder", "aligner"])
def test_whisper_model_needs_its_graphs(speech, role):
    del speech["graphs"][role]
    article = "a" if role == "decoder" else "an"
    with pytest.raises(ConfigError, match=rf"m\.json: graphs: needs {article} {role}"):
        parsed(speech)


def test_whisper_model_without_alignment_heads_needs_no_aligner(speech):
    del speech["graphs"]["aligner"]
    speech["whisper"]["alignment_heads"] = []
    assert "aligner" not in parsed(speech).graphs


def test_whisper_model_needs_its_part(speech):
    with pytest.raises(ConfigError, match=r"m\.json: whisper: is missing although family is whisper"):
        parsed(speech | {"whisper": None})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        *[
            (name, 64, f"whisper.{name}: is not below vocab_size, 64")
            for name in ("start_id", "end_id", "previous_id", "no_speech_id", "no_timestamps_id", "timestamp_begin_id")
        ],
        ("translate_id", 64, "whisper.translate_id: is not below vocab_size, 64"),
        ("language_ids", {"en": 1, "fr": 99}, "whisper.language_ids: is not below vocab_size, 64"),
        ("suppress_ids", [1, 64], "whisper.suppress_ids: is not below vocab_size, 64"),
        ("begin_suppress_ids", [64], "whisper.begin_suppress_ids: is not below vocab_size, 64"),
        ("suppress_ids", [-1], "whisper.suppress_ids[0]: Expected `int` >= 0"),
        ("end_id", 50, "whisper.end_id: is not below timestamp_begin_id"),
        ("num_frames", 41, "whisper.num_frames: is odd; the encoder makes one position of two frames"),
        ("alignment_heads", [[2, 0]], "whisper.alignment_heads: there is no head 0 in a layer 2"),
        ("alignment_heads", [[0, 0], [0, 3]], "whisper.alignment_heads: there is no head 3 in a layer 0"),
        ("alignment_heads", [[0]], "whisper.alignment_heads[0]: Expected `array` of length >= 2"),
    ],
)
def test_number_of_a_whisper_model_that_fits_no_other_is_refused(speech, field, value, message):
    speech["whisper"][field] = value
    with pytest.raises(ConfigError) as caught:
        parsed(speech)
    assert str(caught.value) == f"m.json: {message}"
