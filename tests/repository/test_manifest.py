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
